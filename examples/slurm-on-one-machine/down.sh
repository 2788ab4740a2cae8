#!/usr/bin/env bash
# down.sh DIR [--purge] - stops the cluster that up.sh has started in DIR.
#
# Cancels its jobs, stops its daemons (of this DIR only) and kills what a dead slurmd has left behind. With --purge also
# removes DIR, accounting and all, and its line in /etc/hosts. Packages stay installed.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C

say() { printf 'down.sh: %s\n' "$*"; }
refuse() { say "$@" >&2; exit 2; }
case ${1-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;; esac
[[ $# = 1 || $# = 2 && $2 = --purge ]] && [ -n "$1" ] && [[ $1 != -* ]] || refuse "usage: down.sh DIR [--purge]"
[ -e "$1" ] || { say "$1: nothing there"; exit; }
[ -e "$1/settings" ] || refuse "$1: no cluster of up.sh"
[ "$(id -u)" = 0 ] || { say "not root" >&2; exit 3; }
dir=$(cd "$1" && pwd -P)
# One up.sh or down.sh at a time
[ "${ONE_MACHINE_LOCKED-}" = "$dir" ] ||
    ONE_MACHINE_LOCKED=$dir exec flock -o "$dir" bash "$(dirname "${BASH_SOURCE[0]}")/down.sh" "$dir" ${2+"$2"}
export SLURM_CONF=$dir/etc/slurm.conf

runs() { grep -qs . "/proc/$1/cmdline"; }  # a zombie's is empty
ours() {  # ours PIDFILE: prints the pid where that process runs and is of this DIR
    local pid; pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] &&
        grep -qs "$dir/" "/proc/$pid/cmdline" "/proc/$pid/environ" && echo "$pid"
}
stop() {  # stop SIGNAL PIDFILE...: and SIGKILL to those that have not ended after 20 s
    local signal=$1 file pid pids=() i; shift
    for file in "$@"; do if pid=$(ours "$file"); then pids+=("$pid"); kill "-$signal" "$pid" 2>/dev/null || true; fi; done
    for pid in "${pids[@]}"; do
        for ((i = 0; i < 400; i++)); do runs "$pid" || continue 2; sleep 0.05; done
        say "killing $pid"; kill -KILL "$pid" 2>/dev/null || true
    done
    rm -f "$@"
}
leftovers() {  # step daemons, which work in this DIR's log folder, and processes of jobs
    local proc
    for proc in /proc/[0-9]*; do
        case $(readlink "$proc/exe") in
            */slurmstepd*) case $(readlink "$proc/cwd") in "$dir"/*) echo "${proc#/proc/}" ;; esac ;;
            *) if grep -qzx "SLURM_CONF=$SLURM_CONF" "$proc/environ" && grep -qz '^SLURMD_NODENAME=' "$proc/environ"; then
                echo "${proc#/proc/}"
            fi ;;
        esac
    done 2>/dev/null || true
}

if ours "$dir/run/slurmctld.pid" >/dev/null && jobs=$(timeout 10 squeue -h -o %A | sort -u) && [ -n "$jobs" ]; then
    say "cancelling $(wc -w <<< "$jobs") jobs"
    xargs timeout 30 scancel <<< "$jobs" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
fi
stop TERM "$dir"/run/slurmd-*.pid
for pid in $(leftovers); do kill -KILL "$pid" 2>/dev/null || true; done
stop TERM "$dir/run/slurmctld.pid"
stop TERM "$dir/run/slurmdbd.pid"
stop "$([ "${2-}" = --purge ] && echo KILL || echo TERM)" "$dir/run/mariadbd.pid"
stop TERM "$dir/run/munged.pid"
if [ "${2-}" = --purge ]; then
    (
        flock 9  # other clusters' lines
        rest=$(grep -v "# one-machine $dir\$" /etc/hosts || true)
        printf '%s\n' "$rest" > /etc/hosts
    ) 9</etc/hosts
    rm -rf "$dir"
    say "$dir is down and removed"
else
    say "$dir is down; up.sh $dir starts it again"
fi
