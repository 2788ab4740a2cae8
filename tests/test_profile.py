"""Slurm profiles: what is refused, what is merged and what sbatch is told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from calling import assert_refused, call

from sdae.config import STAGES
from sdae.errors import UserError
from slurm.profile import SET, Profile, Resources, load_profile, to_minutes

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").rglob("profiles/*.yaml"))


def load(folder: Path, text: str) -> Profile:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_profile(path)


def sbatch(resources: Resources, tasks: int | None = 3) -> list[str]:
    """The lines of the script that submitit makes of it."""
    from submitit.slurm.slurm import _make_sbatch_string

    text: str = _make_sbatch_string("work", "logs", map_count=tasks, job_name="name", **resources.parameters())
    return text.splitlines()


# Bad profiles

BAD = [
    ("", "expected a mapping of keys"),
    ("- partition: a", "expected a mapping of keys"),
    ("partition: gpu", "time: missing", "4h"),
    ("time:", "time: missing"),
    ("time: 0", "time: missing or 0"),
    ('time: "0:00:00"', "time: missing or 0"),
    ("time: 1:30:00", 'line 1: 1:30:00 wants quotes, "1:30:00"'),
    ("nodes: 2\ntime: 90:00", "line 2: 90:00 wants quotes"),
    ("time: 4h\nstages:\n  cost:\n    time: 1:30", "line 4: 1:30 wants quotes"),
    ("time: 4h\nsbatch: {begin: 16:00}", "line 2: 16:00 wants quotes"),
    ("time: 1.5", "time: '1.5' is no time", "2-12:00:00"),
    ("time: yes", "time: 'True' is no time"),
    ("time: -5", "time: '-5' is no time"),
    ("time: soon", "time: 'soon' is no time"),
    ("time: 4 h", "time: '4 h' is no time"),
    ("time: UNLIMITED", "time: 'UNLIMITED' is no time"),
    ("time: [4h]", "time: "),
    ('time: "1:2:3:4"', "time: '1:2:3:4' is no time"),
    ("time: 4h\npartion: gpu", "partion: unknown key", "partition, account"),
    ("time: 4h\ntime: 5h", "key 'time' is given twice"),
    ("time: 4h\npartition: 83", "partition: 83 is not text", "quotes"),
    ("time: 4h\naccount: 007", "account: 7 is not text"),
    ("time: 4h\nqos: no", "qos: False is not text"),
    ("time: 4h\nconstraint: a b", "constraint: 'a b' is not text without blanks"),
    ('time: 4h\npartition: ""', "partition: '' is not text"),
    ('time: 4h\npartition: "gpu\\n#SBATCH --wrap=true"', "partition: 'gpu"),
    ("time: 4h\nexclude: [node1, node2]", "exclude: ['node1', 'node2'] is not text"),
    ("time: 4h\nnodes: 0", "nodes: 0: input should be greater than or equal to 1"),
    ("time: 4h\nnodes: '2'", "nodes: '2': input should be a valid integer"),
    ("time: 4h\ngpus: -1", "gpus: -1: input should be greater than or equal to 0"),
    ("time: 4h\ngpus: yes", "gpus: True: input should be a valid integer"),
    ("time: 4h\ngpus: a100:4", "gpus: 'a100:4': input should be a valid integer"),
    ("time: 4h\ncpus: 2.5", "cpus: 2.5: input should be a valid integer"),
    ("time: 4h\narray_parallelism: 0", "array_parallelism: 0: input should be greater"),
    ("time: 4h\ngpus: 2\ntasks: 4", "tasks: 4 on gpus: 2"),
    ("time: 4h\nmemory: 16", "memory: 16 is no memory", "16G or 4000M"),
    ("time: 4h\nmemory: 16 GB", "memory: '16 GB' is no memory"),
    ("time: 4h\nmemory: lots", "memory: 'lots' is no memory"),
    ("time: 4h\nmemory: no", "memory: False is no memory"),
    ("time: 4h\nwarn_seconds: 14400", "warn_seconds: 14400 is not below time: 4h = 240 min"),
    ('time: "0:30"', "warn_seconds: 120 is not below time: 0:30 = 1 min"),
    ("time: 4h\nwarn_seconds: 0", "warn_seconds: 0: input should be greater"),
    ("time: 4h\nwarn_seconds: 2m", "warn_seconds: '2m': input should be a valid integer"),
    ("time: 4h\nrequeue: maybe", "requeue: 'maybe': input should be a valid boolean"),
    ("time: 4h\nsetup: module load cuda", "setup: 'module load cuda': input should be a valid list"),
    ("time: 4h\nsetup: [1]", "setup.0: 1: input should be a valid string"),
    ('time: 4h\npython: ""', "python: "),
    ("time: 4h\nsbatch: [hold]", "sbatch: expected a mapping"),
    ("time: 4h\nsbatch: --hold", "sbatch: expected a mapping"),
    ("time: 4h\nsbatch: {--hold: true}", "sbatch: '--hold' is no long option of sbatch without its dashes"),
    ("time: 4h\nsbatch: {p: gpu}", "sbatch: 'p' is no long option"),
    ("time: 4h\nsbatch: {begin: 2026-01-01}", "sbatch: begin is datetime.date(2026, 1, 1)", "quotes"),
    ("time: 4h\nsbatch: {nice: 1.5}", "sbatch: nice is 1.5"),
    ("time: 4h\nsbatch: {licenses: [a, b]}", "sbatch: licenses is ['a', 'b']"),
    ('time: 4h\nsbatch: {comment: "a\\nb"}', "sbatch: comment is 'a\\nb'"),
    ("time: 4h\nsbatch: {mem_per_cpu: 4G}", "sbatch: mem-per-cpu is the key memory of a profile"),
    ("time: 4h\nsbatch: {gres: 'gpu:a100:4'}", "sbatch: gres is the key gpus of a profile"),
    ("time: 4h\nsbatch: {signal: USR1@60}", "sbatch: signal is the key warn_seconds of a profile"),
    ("time: 4h\nsbatch: {arr: 0-3}", "sbatch: arr is set by the suite"),
    ("time: 4h\nstages: [cost]", "stages: ['cost']: expected a mapping of keys"),
    ("time: 4h\nstages: {cost: 3}", "stages.cost: 3: expected a mapping of keys"),
    ("time: 4h\nstages: {train: {gpus: 1}}", "stages.train: unknown stage", ", ".join(STAGES)),
    ("time: 4h\nstages: {cost: {gpu: 1}}", "stages.cost.gpu: unknown key", "gpu_type"),
    ("time: 4h\nstages: {cost: {stages: {}}}", "stages.cost.stages: unknown key"),
    ("time: 4h\nstages: {cost: {gpus: many}}", "stages.cost.gpus: 'many': input should be a valid integer"),
    ("time: 4h\nstages: {cost: {time: 2m}}", "stages.cost.warn_seconds: 120 is not below time: 2m = 2 min"),
    ("time: 4h\ngpus: 4\ntasks: 4\nstages: {cost: {gpus: 1}}", "stages.cost.tasks: 4 on gpus: 1"),
    ("time: 4h\nstages: {cost: {sbatch: {wrap: ls}}}", "stages.cost.sbatch: wrap is set by the suite"),
    ("time: 4h\n\tnodes: 1", "line 2", "YAML"),
]


@pytest.mark.parametrize(("text", "parts"), [(text, parts) for text, *parts in BAD])
def test_a_bad_profile_is_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'cluster.yaml'}:"), message
    assert "\n" not in message and len(message) < 400, message
    for part in parts:
        assert part in message


def test_every_option_that_the_suite_has_is_refused(tmp_path: Path) -> None:
    for key, options in SET.items():
        for option in options.split():
            with pytest.raises(UserError, match=f"sbatch: {option} is .*{key or 'set by the suite'}"):
                load(tmp_path, f"time: 4h\nsbatch: {{{option}: x}}")


def test_bad_files_at_the_command_line(tmp_path: Path) -> None:
    assert_refused(call("doctor", "--profile", tmp_path / "none.yaml"), "none.yaml: no such file")
    (tmp_path / "bad.yaml").write_text("time: 4h\ngpu: 1\n")
    assert_refused(call("doctor", "--json", "--profile", tmp_path / "bad.yaml"), "bad.yaml: gpu: unknown key", "gpus")


# Good ones


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("90:00", 90), ("90:01", 91), ("0:30", 1), ("1:30:00", 90), ("0:30:00", 30), ("100:00:00", 6000),
        ("2-0", 2880), ("2-12", 3600), ("2-00:30", 2910), ("2-12:00:30", 3601), ("4h", 240), ("30m", 30), ("1d", 1440),
        ("1d12h30m", 2190), ("1h30m", 90),
    ],
)  # fmt: skip
def test_times_are_sbatchs_own(text: str, minutes: int, tmp_path: Path) -> None:
    assert to_minutes(text) == minutes
    assert load(tmp_path, f'time: "{text}"\nwarn_seconds: 1').minutes == minutes


def test_times_of_every_size() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(300):
        days, hours, minutes, seconds = (draw.randrange(n) for n in (30, 24, 60, 60))
        whole = days * 1440 + hours * 60 + minutes
        assert to_minutes(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == whole + (seconds > 0)
        assert to_minutes(f"{24 * days + hours}:{minutes:02}:{seconds:02}") == whole + (seconds > 0)
        assert to_minutes(f"{days}d{hours}h{minutes}m") == to_minutes(str(whole)) == whole


def test_what_yaml_reads_as_numbers_and_is_not_ambiguous(tmp_path: Path) -> None:
    assert load(tmp_path, "time: 90").minutes == 90
    assert load(tmp_path, "time: 0:30:00").minutes == 30  # text to YAML, for the leading 0
    assert load(tmp_path, "time: 2-00:00:00").minutes == 2880
    assert load(tmp_path, "time: 4h\nsetup: ['date +1:30:00', \"x 1:30\"]").setup == ["date +1:30:00", "x 1:30"]
    assert load(tmp_path, "time: 4h\nmemory: 0").parameters()["mem"] == "0"
    assert load(tmp_path, "time: 4h\nmemory: 16gb").memory == "16G"


def test_sbatch_is_told_what_the_profile_says(tmp_path: Path) -> None:
    text = """
partition: a,b
account: us
qos: high
reservation: room
constraint: a100&ib
exclude: node[1-2]
nodes: 2
gpus: 4
gpu_type: a100
cpus: 8
memory: 100G
time: 1-02:00:00
warn_seconds: 60
array_parallelism: 2
sbatch: {mail_type: FAIL, exclusive: true, nice: 100, comment: null, contiguous: false, gres: 'nvme:1'}
setup: [module load cuda, 'echo "$HOSTNAME"']
"""
    lines = sbatch(load(tmp_path, text).resources("pretrain"))
    logs = str(Path("logs").absolute())
    assert lines == [
        "#!/bin/bash", "", "# Parameters",
        "#SBATCH --account=us",
        "#SBATCH --array=0-2%2",
        "#SBATCH --constraint='a100&ib'",
        "#SBATCH --cpus-per-task=8",
        f"#SBATCH --error={logs}/%A_%a_0_log.err",
        "#SBATCH --exclude='node[1-2]'",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --gres=nvme:1",
        "#SBATCH --job-name=name",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --mem=100G",
        "#SBATCH --nice=100",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={logs}/%A_%a_0_log.out",
        "#SBATCH --partition=a,b",
        "#SBATCH --qos=high",
        "#SBATCH --requeue",
        "#SBATCH --reservation=room",
        "#SBATCH --signal=USR2@60",
        "#SBATCH --time=1560",
        "", "# setup", "module load cuda", 'echo "$HOSTNAME"',
        "", "# command", "export SUBMITIT_EXECUTOR=slurm",
        f"srun --unbuffered --output {logs}/%A_%a_%t_log.out --error {logs}/%A_%a_%t_log.err "
        "--kill-on-bad-exit=1 --cpus-per-task=8 work",
    ]  # fmt: skip


def test_what_is_not_said_is_not_asked_for(tmp_path: Path) -> None:
    lines = sbatch(load(tmp_path, "time: 10").resources("cost"), tasks=1000)
    told = sorted(line.removeprefix("#SBATCH --").split("=")[0] for line in lines if line.startswith("#SBATCH"))
    assert told == [
        "array", "cpus-per-task", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks-per-node", "open-mode",
        "output", "requeue", "signal", "time",
    ]  # fmt: skip
    assert "#SBATCH --array=0-999%1000" in lines  # and not submitit's 256
    assert "# setup" not in lines


@pytest.mark.parametrize(
    ("text", "there", "absent"),
    [
        ("requeue: false", ["--no-requeue"], ["--requeue"]),
        ("sbatch: {wckey: ours}", ["--wckey=ours"], []),
        ("sbatch: {kill-on-invalid-dep: no}", ["--kill-on-invalid-dep=no"], []),
        ("sbatch: {kill_on_invalid_dep: yes}", ["--kill-on-invalid-dep=yes"], []),
        ("sbatch: {kill-on-invalid-dep: null}", [], ["--kill-on-invalid-dep=yes"]),
        ("gpu_type: a100", ["--ntasks-per-node=1"], ["--gpus-per-node=a100:0", "--gpus-per-node=0"]),
        ("gpus: 2", ["--ntasks-per-node=2", "--gpus-per-node=2"], []),
        ("gpus: 2\ntasks: 1", ["--ntasks-per-node=1", "--gpus-per-node=2"], []),
        ("tasks: 3", ["--ntasks-per-node=3"], []),
    ],
)
def test_options_in_detail(text: str, there: list[str], absent: list[str], tmp_path: Path) -> None:
    lines = sbatch(load(tmp_path, f"time: 4h\n{text}"))
    assert {f"#SBATCH {option}" for option in there} <= set(lines)
    assert not {f"#SBATCH {option}" for option in absent} & set(lines)


def test_submitits_executor_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", staticmethod(lambda: 1))
    profile = load(tmp_path, "time: 4h\ngpus: 2\nsbatch: {comment: x}\nsetup: [date]")
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(**profile.parameters())
    text = executor._make_submission_file_text("work", "id")
    assert "--comment=x" in text and "--gpus-per-node=2" in text and "wckey" not in text


def test_stages_are_put_over_the_rest(tmp_path: Path) -> None:
    profile = load(
        tmp_path,
        "partition: gpu\ntime: 4h\ngpus: 8\nsetup: [a]\nsbatch: {mail-type: FAIL, hold: true}\nstages:\n"
        "  cost: {gpus: 1, partition: null, setup: [b], sbatch: {hold: null, nice: 1}}\n  finetune: {gpus: 8}\n",
    )
    cost, finetune = profile.resources("cost"), profile.resources("finetune")
    assert (cost.gpus, cost.tasks_per_node, cost.partition, cost.setup, cost.time) == (1, 1, None, ["b"], "4h")
    assert {"mail-type": "FAIL", "nice": 1}.items() <= cost.parameters()["additional_parameters"].items()
    assert "hold" not in cost.parameters()["additional_parameters"]
    assert profile.resources("pretrain") == finetune
    assert type(finetune) is Resources


def test_equal_resources_have_one_key(tmp_path: Path) -> None:
    text = "time: 4h\ngpus: 2\nstages: {cost: {time: '4:00:00', tasks: 2}, pretrain: {time: 240}, linprobe: {cpus: 2}}"
    profile = load(tmp_path, text)
    keys = {stage: profile.resources(stage).key for stage in STAGES}
    assert keys["cost"] == keys["pretrain"] == keys["finetune"] != keys["linprobe"]
    assert load(tmp_path, f"{text}\npython: other").resources("cost").key != keys["cost"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, tmp_path: Path) -> None:
    profile = load_profile(path)
    for stage in STAGES:
        assert sbatch(profile.resources(stage))
    again = load(tmp_path, profile.model_dump_json())  # as a submission keeps it
    assert [again.resources(stage).key for stage in STAGES] == [profile.resources(stage).key for stage in STAGES]
    assert f"--profile examples/profiles/{path.name}" in path.read_text()


def test_examples_are_what_their_names_say() -> None:
    found = {path.stem: load_profile(path) for path in EXAMPLES}
    gpus = {n: [p.resources(s).nodes * p.resources(s).gpus for s in STAGES] for n, p in found.items()}
    assert list(STAGES) == ["pretrain", "finetune", "linprobe", "segment", "detect", "cost"]
    assert gpus == {"a100": [4, 4, 1, 4, 4, 1], "cpu": [0] * 6, "h100": [16, 8, 1, 8, 8, 1], "v100": [8, 8, 8, 8, 8, 1]}
