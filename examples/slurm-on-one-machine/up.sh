#!/usr/bin/env bash
# up.sh DIR - a real Slurm cluster of several pretend nodes on this one machine, all of it under DIR.
#
# Needs root on Debian or Ubuntu, neither systemd nor cgroups. Outside DIR it installs the packages that are missing
# and adds a line with the nodes' names to /etc/hosts; the machine's own Slurm, munge and MariaDB are left alone.
# Run it again at will: what runs is left alone, what has died is started again, nodes that are down are resumed.
#
#   ./up.sh /tmp/su && . /tmp/su/env.sh && sinfo
#
# Settings, from the environment; a DIR remembers them, and they change only while it is down:
#   ONE_MACHINE_NODES=4 ONE_MACHINE_CPUS=2 ONE_MACHINE_GPUS=2 ONE_MACHINE_MEM_MB=4096   (each but the first: per node)
#   ONE_MACHINE_MAX_ARRAY=1001   MaxArraySize: one more than the largest index of an array
#   ONE_MACHINE_MAX_JOBS=10000   MaxJobCount: jobs that the controller holds at a time
#   ONE_MACHINE_GRACE=20         seconds from the signal of a preemption to the end of the job
#   ONE_MACHINE_KILL_WAIT=2      seconds from SIGTERM to SIGKILL
#   ONE_MACHINE_NODE_TIMEOUT=10  seconds of silence after which a node is down and its jobs are requeued
#   ONE_MACHINE_CRED_EXPIRE=10   seconds that a requeued job waits before it starts again
#   ONE_MACHINE_PORT             the first of the TCP ports used, up to 100; not given: the first free hundred
#   ONE_MACHINE_INSTALL=yes      no: stop with an error where a package is missing
set -euo pipefail
umask 022
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
settings=(  # name, default, least, most
    "NODES 4 1 64" "CPUS 2 1 256" "GPUS 2 0 6" "MEM_MB 4096 64 1000000" "MAX_ARRAY 1001 2 4000001"
    "MAX_JOBS 10000 10 1000000" "GRACE 20 0 3600" "KILL_WAIT 2 1 3600" "NODE_TIMEOUT 10 3 3600"
    "CRED_EXPIRE 10 5 3600" "PORT 0 1024 65400"
)
packages=(slurmctld slurmd slurm-client slurmdbd slurm-wlm-basic-plugins munge mariadb-server)
programs=(slurmctld slurmd sbatch srun sacct slurmdbd munged mariadbd mariadb mariadb-install-db flock setsid)

say() { printf 'up.sh: %s\n' "$*"; }
die() { say "$@" >&2; exit 1; }
refuse() { say "$@" >&2; exit 2; }   # what was asked for is wrong
lacking() { say "$@" >&2; exit 3; }  # it cannot be had here
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
case ${1-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;; esac
[ $# = 1 ] && [ -n "$1" ] && [[ $1 != -* ]] || refuse "usage: up.sh DIR (a folder to make; --help tells the settings)"
[ "$(id -u)" = 0 ] || lacking "not root: Slurm's daemons start jobs as other users"
[ ! -e "$1" ] || [ -d "$1" ] || refuse "$1: not a folder"
[ ! -d "$1" ] || [ -e "$1/settings" ] || [ -z "$(ls -A "$1")" ] || refuse "$1: holds other things; give a new or an empty folder"
began=$(date +%s)

# --- settings -------------------------------------------------------------------------------------------------------
for row in "${settings[@]}"; do
    read -r name _ least most <<< "$row"
    given=ONE_MACHINE_$name
    [ -z "${!given-}" ] || { [[ ${!given} =~ ^[0-9]{1,7}$ ]] && ((10#${!given} >= least && 10#${!given} <= most)); } ||
        refuse "$given=${!given}: a whole number from $least to $most"
done
dir=$(realpath -m -- "$1")
# The path of a Unix socket stays below 108 bytes, and slurmstepd makes DIR/spool/node1/node1_<job>.<step>
[ ${#dir} -le 64 ] || refuse "$dir: ${#dir} characters; the sockets in it allow 64"
[[ $dir =~ ^[A-Za-z0-9/._-]+$ ]] || refuse "$dir: letters, digits and . _ - only, because Slurm's files cannot quote"
mkdir -p "$dir"
# One up.sh or down.sh at a time; -o: the daemons do not inherit the lock
[ "${ONE_MACHINE_LOCKED-}" = "$dir" ] || ONE_MACHINE_LOCKED=$dir exec flock -o "$dir" bash "$here/up.sh" "$dir"
unset ONE_MACHINE_LOCKED
mkdir -p "$dir"  # a down.sh --purge may have had the lock before

alive() {  # alive PIDFILE: that process runs and is of this DIR (a zombie's files are empty)
    local pid; pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && grep -qs "$dir/" "/proc/$pid/cmdline" "/proc/$pid/environ"
}
running=
for file in "$dir"/run/*.pid; do if alive "$file"; then running=1; fi; done
declare -A is=()
if [ -e "$dir/settings" ]; then . "$dir/settings"; fi
for row in "${settings[@]}"; do
    read -r name default _ <<< "$row"
    given=ONE_MACHINE_$name old=${is[$name]-}
    is[$name]=${!given:-${old:-$default}}
    [ -z "$running" ] || [ "${is[$name]}" = "$old" ] || refuse "$given=${!given}: $dir runs with $old; take it down first"
done
remember() { declare -p is > "$dir/settings"; }
remember

# --- packages -------------------------------------------------------------------------------------------------------
missing=()
for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
# Without its MySQL plugin slurmdbd starts, and fails then
compgen -G '/usr/lib/*/slurm*/accounting_storage_mysql.so' >/dev/null || missing+=(accounting_storage_mysql.so)
if [ ${#missing[@]} -gt 0 ]; then
    [ "${ONE_MACHINE_INSTALL-yes}" = yes ] || lacking "missing: ${missing[*]} (packages: ${packages[*]})"
    command -v apt-get >/dev/null || lacking "missing: ${missing[*]}, and no apt-get here to install ${packages[*]}"
    say "installing ${packages[*]}"
    policy=/usr/sbin/policy-rc.d
    (
        if [ ! -e $policy ]; then  # the packages are not to start services of their own
            trap 'rm -f $policy' EXIT
            printf '#!/bin/sh\nexit 101\n' > $policy
            chmod +x $policy
        fi
        # A stale list of packages gives 404, so it is refreshed; that one of several sources is away need not matter
        apt-get update || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
    ) </dev/null >"$dir/apt.log" 2>&1 || { tail -20 "$dir/apt.log" >&2; die "apt-get failed: see $dir/apt.log"; }
    hash -r
fi

# --- configuration --------------------------------------------------------------------------------------------------
nodes=${is[NODES]}
ports_free() {  # ports_free BASE: prints the first that is taken, and fails, where one is
    local port
    for port in $(seq "$1" $(($1 + 2))) $(seq $(($1 + 11)) $(($1 + 10 + nodes))); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port"; return 1; fi
    done
}
if [ -z "$running" ]; then
    if [ -n "${ONE_MACHINE_PORT-}" ]; then
        taken=$(ports_free "${is[PORT]}") || refuse "ONE_MACHINE_PORT=${is[PORT]}: port $taken is taken"
    elif [ "${is[PORT]}" = 0 ] || ! ports_free "${is[PORT]}" >/dev/null; then
        # Below the ports that the kernel hands out; clusters that start together begin to look at different places
        for ((i = $(cksum <<< "$dir" | cut -d' ' -f1) % 120, tries = 0; ; i = (i + 1) % 120, tries++)); do
            [ $tries -lt 120 ] || die "no hundred free TCP ports from 20000 to 31999"
            is[PORT]=$((20000 + 100 * i))
            if ports_free "${is[PORT]}" >/dev/null; then break; fi
        done
    fi
    remember
fi
port=${is[PORT]} first_port=$((is[PORT] + 11)) last_port=$((is[PORT] + 10 + nodes))
names=node[1-$nodes] node_ports=[$first_port-$last_port]
[ "$nodes" -gt 1 ] || names=node1 node_ports=$first_port

configure() {
    local host bind='' gres='' gres_line='' cgroup=disabled version
    local devices=(/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty)
    host=$(hostname -s)
    chmod 755 "$dir"
    mkdir -p "$dir"/{etc,log,run,state,spool}
    mkdir -p -m 700 "$dir/munge"
    # "Listen on one address only" means, to Slurm, that of the host's name: possible where that is 127.* only
    case $(getent ahostsv4 "$(hostname)" | head -1) in 127.*) bind=NoInAddrAny ;; esac
    cat > "$dir/etc/my.cnf" <<CNF
[mariadbd]
user=root
datadir=$dir/db
socket=$dir/run/mariadb.sock
pid-file=$dir/run/mariadbd.pid
log-error=$dir/log/mariadbd.log
bind-address=127.0.0.1
port=$((port + 2))
skip-name-resolve
innodb_buffer_pool_size=128M
innodb_log_file_size=32M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
CNF
    install -m 600 /dev/null "$dir/etc/slurmdbd.conf"  # refused where others can read it
    cat >> "$dir/etc/slurmdbd.conf" <<CNF
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
${bind:+CommunicationParameters=$bind}
CNF
    if [ "${is[GPUS]}" -gt 0 ]; then
        # A pretend GPU wants a character device of its own, whichever; a mere count or a plain file does not load
        gres=Gres=gpu:${is[GPUS]}
        gres_line="NodeName=$names Name=gpu File=$(IFS=,; echo "${devices[*]:0:${is[GPUS]}}")"
    fi
    printf '%s\n' "$gres_line" > "$dir/etc/gres.conf"
    # slurmd loads a cgroup plugin though nothing here uses it, and v2, its usual choice, wants systemd. It can be told
    # to load none from 23.02 on; before, v1 does nothing until asked.
    version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -1)
    [ "$(printf '%s\n' 23.02 "$version" | sort -V | head -1)" = 23.02 ] || cgroup=cgroup/v1
    echo "CgroupPlugin=$cgroup" > "$dir/etc/cgroup.conf"
    cat > "$dir/etc/slurm.conf" <<CNF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits cred_expire seconds (120 where it is not set or below 5). Under about 8 it may meet its own last
# processes on the node, and is then held: "launch failed requeued held".
AuthInfo=socket=$dir/run/munge.sock,cred_expire=${is[CRED_EXPIRE]}
${bind:+CommunicationParameters=$bind,NoCtldInAddrAny}
# Ids that start at 1 in each new DIR would meet the result files of older jobs in a log folder
FirstJobId=$(($(date +%s) % 60000000 + 1000))
MaxArraySize=${is[MAX_ARRAY]}
MaxJobCount=${is[MAX_JOBS]}

StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none

# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
# munge's socket once more: what talks to slurmdbd does not look at AuthInfo
AccountingStoragePass=$dir/run/munge.sock
AccountingStorageTRES=gres/gpu

# Seconds; with Slurm's own (60, 30, 3) a freed or requeued job may wait for another minute
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=512
GresTypes=gpu
JobRequeue=1
KillWait=${is[KILL_WAIT]}
SlurmdTimeout=${is[NODE_TIMEOUT]}
# A node that was down comes back by itself
ReturnToService=2
# Jobs of main and short push those of low and spot off their nodes. These get the signal they asked for (--signal), and
# GRACE seconds later the end: low's are queued again, spot's are over, in state PREEMPTED.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# On paper the nodes have more CPUs and memory than the machine
SlurmdParameters=config_overrides
NodeName=$names NodeHostname=$host NodeAddr=127.0.0.1 Port=$node_ports CPUs=${is[CPUS]} RealMemory=${is[MEM_MB]} $gres State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 DefaultTime=60 MaxTime=INFINITE
PartitionName=short Nodes=ALL PriorityTier=10 DefaultTime=5 MaxTime=5
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=${is[GRACE]} DefaultTime=60 MaxTime=INFINITE
PartitionName=spot Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=${is[GRACE]} DefaultTime=60 MaxTime=INFINITE
CNF
    echo "export SLURM_CONF=$dir/etc/slurm.conf" > "$dir/env.sh"
}
[ -n "$running" ] || configure
export SLURM_CONF=$dir/etc/slurm.conf
# Jobs take the first name in SLURM_JOB_NODELIST for MASTER_ADDR, so it must resolve
line="127.0.0.1$(printf ' node%d' $(seq "$nodes")) # one-machine $dir"
if ! grep -qxF "$line" /etc/hosts; then
    (
        flock 9  # other clusters' lines
        rest=$(grep -v "# one-machine $dir\$" /etc/hosts || true)
        printf '%s\n%s\n' "$rest" "$line" > /etc/hosts  # not by sed -i: in a container it cannot be replaced
    ) 9</etc/hosts
fi

# --- daemons (each with its own output: one that keeps ours would keep a pipe open for ever) ------------------------
wait_for() {  # wait_for SECONDS WHAT COMMAND...: until COMMAND succeeds
    local end=$((SECONDS + $1)) what=$2; shift 2
    while [ $SECONDS -lt $end ]; do if timeout 10 "$@" >/dev/null 2>&1; then return; fi; sleep 0.1; done
    grep -hiE 'error|fatal' "$dir"/log/* | tail -20 >&2
    die "$what did not come up: look in $dir/log"
}
start() {  # start NAME COMMAND...
    local name=$1; shift
    "$@" </dev/null >>"$dir/log/$name.out" 2>&1 || die "$name did not start: $(tail -1 "$dir/log/$name.out") (see $dir/log)"
}
if ! alive "$dir/run/munged.pid"; then
    [ -s "$dir/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$dir/munge/munge.key")
    # --force: munged minds who may write to the folders above its socket, and a socket that a dead one has left
    start munged munged --force --key-file="$dir/munge/munge.key" --seed-file="$dir/munge/munged.seed" --num-threads=10 \
        --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log"
fi
if ! alive "$dir/run/mariadbd.pid"; then
    if [ ! -d "$dir/db" ]; then
        rm -rf "$dir/db.new"
        start mariadb-install-db mariadb-install-db --defaults-file="$dir/etc/my.cnf" --datadir="$dir/db.new" --user=root \
            --skip-test-db --auth-root-authentication-method=normal
        mv "$dir/db.new" "$dir/db"
    fi
    start mariadbd setsid -f mariadbd --defaults-file="$dir/etc/my.cnf"
    wait_for 240 mariadbd mariadb --no-defaults --socket="$dir/run/mariadb.sock" --user=root -e "
        create database if not exists slurm_acct_db;
        create user if not exists slurm@'127.0.0.1' identified by 'slurm';
        grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
fi
if ! alive "$dir/run/slurmdbd.pid"; then
    start slurmdbd slurmdbd
    wait_for 240 slurmdbd sacctmgr -n show cluster
fi
[ -n "$(sacctmgr -n show cluster here format=cluster)" ] || sacctmgr -i add cluster here >/dev/null
if ! alive "$dir/run/slurmctld.pid"; then
    start slurmctld slurmctld -f "$SLURM_CONF"
    wait_for 240 slurmctld scontrol ping
fi
for ((i = 1; i <= nodes; i++)); do
    alive "$dir/run/slurmd-node$i.pid" && continue
    mkdir -p "$dir/spool/node$i"
    start "slurmd-node$i" slurmd -f "$SLURM_CONF" -N "node$i"
done
all_up() {  # a state that ends in * is that of a node which does not answer
    local node
    for node in $(sinfo -h -N -p main -t down,drain,fail -o %N); do
        scontrol update "nodename=$node" state=resume 2>/dev/null || true
    done
    [ "$(sinfo -h -N -p main -o %T | grep -cE '^(idle|mixed|allocated|completing)$')" = "$nodes" ]
}
export -f all_up; export nodes
wait_for 240 "every node" bash -c all_up

say "up in $(($(date +%s) - began)) s: $(sinfo -h -p main -o '%D nodes %T, each %c CPUs, %m MB, %G' | paste -sd ';' | sed 's/, (null)//g')"
echo "use it:    . $dir/env.sh"
echo "take down: $here/down.sh $dir [--purge]"
