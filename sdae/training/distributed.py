"""Ranks: one process by itself, under torchrun, or under srun; gloo for tensors on the CPU, NCCL on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdae.errors import UserError
from sdae.sections import Efficiency

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of a run (torchrun), and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """True where it is true on some rank; ranks must call it together."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag))  # on the CPU, through gloo: nobody waits for a GPU
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def least(self, value: Tensor) -> Tensor:
        """The smallest value over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def together(self, mine: Iterable[T]) -> list[T]:
        """What all ranks have, rank by rank."""
        found = [list(mine)] * self.size
        if self.size > 1:
            dist.all_gather_object(found, found[self.rank])
        return [one for part in found for one in part]

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that some rank has, sorted."""
        return sorted(set(self.together(names)))

    def told(self, value: T) -> T:
        """What the first rank says; ranks must call it together."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, device=torch.device("cpu"))
        return said[0]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


def start(efficiency: Efficiency) -> World:
    """This process's place, read from torchrun's variables, else from srun's, else alone. Joins the group once. Raises
    UserError."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size, local = (int(os.environ.get(k, "0")) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        rank, size, local = (int(os.environ[k]) for k in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_JOB_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    else:
        rank, size, local = 0, 1, 0
    wanted = efficiency.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("efficiency.device: cuda, but this machine has no usable GPU (allowed here: auto, cpu)")
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size)
    return World(rank, size, device)


def stop() -> None:
    """Leaves the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[3-7,9],cpu1` -> gpu3."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.split(",")[0]
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]
