"""A cluster as its user describes it: what a job asks for, stage by stage, checked before Slurm sees it.

One YAML file (examples/profiles/): the keys of `Resources`, and under `stages` those that differ for a stage.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sdae.config import STAGES
from sdae.errors import UserError
from sdae.files import read_plain
from sdae.yamls import LARGEST, explain, merge, read_yaml, shown

UNLIMITED = 1_000_000  # tasks of an array at a time; submitit's own default is 256
SEXAGESIMAL = re.compile(r"[-+]?[1-9][\d_]*(:[0-5]?\d)+(\.\d*)?")  # YAML 1.1 takes 1:30:00 for the number 5400

# sbatch's options that are not for `sbatch:`, by the profile's key to use in their place; none: the suite sets them.
SET = {
    **{key: key for key in ("partition", "account", "qos", "reservation", "constraint", "exclude", "nodes", "time")},
    "tasks": "ntasks ntasks-per-node ntasks-per-core ntasks-per-socket ntasks-per-gpu",
    "gpus": "gpus gpus-per-node gpus-per-task gpus-per-socket",
    "cpus": "cpus-per-task cpus-per-gpu",
    "memory": "mem mem-per-cpu mem-per-gpu",
    "requeue": "requeue no-requeue",
    "warn_seconds": "signal",
    "": "array chdir clusters dependency error job-name open-mode output parsable test-only wait wrap",
}


def to_minutes(text: str) -> int:
    """A time as sbatch takes it (90, 90:00, 1:30:00, 2-12, 2-12:00:00) or with units (1d12h, 4h, 30m), rounded up."""
    if not re.fullmatch(r"(?=.)(\d{1,9}d)?(\d{1,9}h)?(\d{1,9}m)?|(\d{1,9}-)?\d{1,9}(:\d{1,9}){0,2}", text, re.ASCII):
        raise ValueError(f"{shown(text)} is no time (allowed: minutes, minutes:seconds, 1:30:00, 2-12:00:00, 4h, 30m)")
    if units := re.findall(r"(\d+)([dhm])", text):
        return sum(int(number) * {"d": 1440, "h": 60, "m": 1}[unit] for number, unit in units)
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds, *_ = [*parts, 0, 0] if dash or len(parts) == 3 else [0, *parts, 0]
    return math.ceil(int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60)


def _word(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"\S+", value)):
        raise ValueError(f"{value!r} is not text without blanks (in quotes where YAML would read a number or a date)")
    return value


def _time(value: Any) -> str:
    if value is None or to_minutes(str(value)) == 0:  # Slurm takes 0 for no limit
        raise ValueError('missing or 0 (how long a job may take, e.g. "4:00:00" or 4h)')
    return str(value)


def _memory(value: Any) -> str | None:
    text = value.upper().removesuffix("B") if isinstance(value, str) else None if value is None else str(value)
    if text is not None and not re.fullmatch(r"0|[1-9]\d*[KMGT]", text, re.ASCII):
        raise ValueError(f"{value!r} is no memory (allowed: a number with its unit, 16G or 4000M; 0 for all of a node)")
    return text


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of sbatch's long options, e.g. {mail-type: FAIL}")
    options = {str(name).replace("_", "-"): option for name, option in value.items()}
    for name, option in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError(f"{name!r} is no long option of sbatch without its dashes, such as mail-type")
        asked = "gpus" if name == "gres" and "gpu" in str(option) else name
        for key, own in SET.items():  # sbatch takes an option's beginning for the option
            if any(o.startswith(asked) for o in own.split()):
                raise ValueError(f"{name} is {f'the key {key} of a profile' if key else 'set by the suite'}")
        if not isinstance(option, (str, int, type(None))) or "\n" in str(option):
            raise ValueError(f"{name} is {option!r} (allowed: one line of text in quotes, a number, true, false)")
    return options


Word = Annotated[str | None, BeforeValidator(_word)]
Count = Annotated[int, Field(ge=1, strict=True)]


class Resources(BaseModel):
    """What one job asks for. Two that ask for the same have the same `key`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    partition: Word = None
    account: Word = None
    qos: Word = None
    reservation: Word = None
    constraint: Word = None
    exclude: Word = None
    nodes: Count = 1
    tasks: Count | None = None  # per node; None: one a GPU, or one
    gpus: Annotated[int, Field(ge=0, strict=True)] = 0  # per node
    gpu_type: Word = None
    cpus: Count = 1  # per task
    memory: Annotated[str | None, BeforeValidator(_memory)] = None  # per node; None: the cluster's default
    time: Annotated[str, BeforeValidator(_time)] = Field(None, validate_default=True)
    warn_seconds: Annotated[int, Field(ge=1, le=65535, strict=True)] = 120  # that the signal comes before the limit
    requeue: Annotated[bool, Field(strict=True)] = True
    array_parallelism: Count | None = None  # tasks of an array at a time
    sbatch: Annotated[dict[str, str | int | bool | None], BeforeValidator(_options)] = {}
    setup: list[str] = []
    python: Annotated[str, Field(min_length=1)] | None = None

    @property
    def minutes(self) -> int:
        return to_minutes(self.time)

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.gpus or 1

    @property
    def key(self) -> str:
        return json.dumps([self.parameters(), self.python], sort_keys=True)

    @model_validator(mode="after")
    def _possible(self) -> Resources:
        if self.warn_seconds >= 60 * self.minutes:
            raise ValueError(f"warn_seconds: {self.warn_seconds} is not below time: {self.time} = {self.minutes} min")
        if self.gpus and self.tasks_per_node > self.gpus:
            raise ValueError(f"tasks: {self.tasks} on gpus: {self.gpus}, but each task wants a GPU of its own")
        return self

    def parameters(self) -> dict[str, Any]:
        """For `submitit.SlurmExecutor.update_parameters`, and for `_make_sbatch_string`."""
        options = {"requeue" if self.requeue else "no-requeue": True, "reservation": self.reservation} | self.sbatch
        kill = options.get("kill-on-invalid-dep", "yes")
        # YAML makes true and false of yes and no
        options["kill-on-invalid-dep"] = ("yes" if kill else "no") if isinstance(kill, bool) else kill
        values = {
            "partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint,
            "exclude": self.exclude, "time": self.minutes, "nodes": self.nodes, "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus, "mem": self.memory, "signal_delay_s": self.warn_seconds,
            "gpus_per_node": (f"{self.gpu_type}:{self.gpus}" if self.gpu_type else self.gpus) if self.gpus else None,
            "array_parallelism": self.array_parallelism or UNLIMITED, "setup": self.setup or None,
        }  # fmt: skip
        return {name: value for name, value in values.items() if value is not None} | {
            "wckey": None,  # else submitit asks for a wckey `submitit`, which a cluster may not know
            "additional_parameters": {k: v for k, v in options.items() if v is not None and v is not False},
            # srun has not taken over the job's cpus-per-task since 22.05
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus}"],
        }


class Profile(Resources):
    """`stages`: by stage, the keys that are put over the others; `sbatch` is merged option by option."""

    stages: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _each(self) -> Profile:
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"stages.{stage}: unknown stage (allowed: {', '.join(STAGES)})")
            try:
                self.resources(stage)
            except ValidationError as error:
                raise ValueError(f"stages.{stage}.{explain(error, Resources)}") from None
        return self

    def resources(self, stage: str) -> Resources:
        return Resources.model_validate(merge(self.model_dump(exclude={"stages"}), self.stages.get(stage, {})))


def load_profile(path: str | Path) -> Profile:
    """A YAML file's profile. Raises `UserError` with one line that names the file."""
    values = read_yaml(path, plain=".slurm" in Path(path).parts)  # a store's own; a user may name a pipe
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys")
    try:
        content = read_plain(path, LARGEST)
    except (OSError, ValueError):  # a pipe, which is read once; or gone since
        content = b""
    for event in yaml.parse(content, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and SEXAGESIMAL.fullmatch(event.value):
            place = f"{path}: line {event.start_mark.line + 1 if event.start_mark else '?'}"
            raise UserError(f'{place}: {event.value} wants quotes, "{event.value}": YAML takes it for a number')
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Profile)}") from None
