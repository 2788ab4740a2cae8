"""How a module is made fast and shared: compiled, checkpointed, one copy a process (DDP) or one part each (FSDP2).

Nothing here changes a number beyond rounding; `optim.bf16_gradients`, which does, is part of the id.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdae.config import CostRun, Detect, Finetune, Linprobe, Pretrain, Segment
from sdae.errors import UserError
from sdae.models.encoder import Block, Encoder
from sdae.sections import Efficiency, Optim
from sdae.training.distributed import World

Trained = Pretrain | Finetune | Linprobe | Segment | Detect
COMPILED_ON = {"cuda"}  # device types; on a CPU the first step would take longer than most runs there


def wrapped(module: nn.Module, config: Trained, world: World) -> nn.Module:
    """The module as the loop calls it. One that `shard` has shared is called as it is. Raises UserError as `refuse`
    does."""
    efficiency = config.efficiency
    refuse(config, world)
    set_checkpointing(module, efficiency.checkpointing)
    if is_sharded(module):
        return module
    if world.size == 1:
        return compiled(module, efficiency, world.device)
    # Outside DDP the compiler cuts the backward pass where DDP's buckets end, so that they are exchanged while it goes
    # on; it cannot cut through a checkpoint. static_graph would forbid the cuts, and buys nothing without them.
    if efficiency.checkpointing:
        return replicated(compiled(module, efficiency, world.device), config)
    return compiled(replicated(module, config), efficiency, world.device)


def refuse(config: Trained, world: World) -> None:
    """Raises UserError for settings of `efficiency` that this stage, or so many processes, cannot have."""
    efficiency = config.efficiency
    if efficiency.fsdp and config.stage != "pretrain":
        raise UserError(f"efficiency.fsdp: true, but a run of the stage {config.stage} is not shared (allowed: false)")
    if efficiency.cuda_graphs and world.size > 1:
        raise UserError(
            f"efficiency.cuda_graphs: true, but gradients of {world.size} processes are exchanged between the graphs "
            "(allowed with several: false)"
        )


def compiled(module: nn.Module, efficiency: Efficiency, device: torch.device) -> nn.Module:
    """Forward and backward pass as one graph each, for fixed shapes."""
    if not efficiency.compile or device.type not in COMPILED_ON:
        return module
    # Each network is one more entry of the same function; beyond the limit torch would silently go on without compiling
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    mode = "reduce-overhead" if efficiency.cuda_graphs and device.type == "cuda" else None
    return torch.compile(module, dynamic=False, mode=mode)  # type: ignore[return-value]


def set_checkpointing(module: nn.Module, wanted: bool) -> None:
    """Whether the encoders compute their blocks' activations again in the backward pass."""
    for child in module.modules():
        if isinstance(child, Encoder):
            child.checkpointing = wanted


def replicated(module: nn.Module, config: Trained) -> DistributedDataParallel:
    """DDP, whose exchange of gradients overlaps the backward pass; in bf16 where the config says so."""
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch 2.14
    own_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, **own_buffers)  # type: ignore[arg-type]
    if exchanges_bf16(config):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        model.register_comm_hook(None, bf16_compress_hook)  # type: ignore[arg-type]
    return model


def exchanges_bf16(config: Trained) -> bool:
    """Whether gradients are exchanged in bf16 (`optim.bf16_gradients`)."""
    return isinstance(config.optim, Optim) and config.optim.bf16_gradients


@torch.no_grad()
def round_to_bf16(module: nn.Module) -> None:
    """What the exchange of several processes does to the gradients, done by one."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    torch._foreach_copy_(gradients, [gradient.bfloat16() for gradient in gradients])


def shard(module: nn.Module, config: Pretrain, world: World) -> None:
    """FSDP2, in place, before the optimizer is made: each block by itself, the rest together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if exchanges_bf16(config) else None)
    compile_it = config.efficiency.compile and world.device.type in COMPILED_ON
    for block in [child for child in module.modules() if isinstance(child, Block)]:
        if compile_it:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are shared among the processes (FSDP2)."""
    return hasattr(module, "set_requires_gradient_sync")


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a shared module are whole, also outside its forward pass."""
    shared: list[Any] = [child for child in module.modules() if is_sharded(child)]
    for child in shared:
        child.unshard()
    try:
        yield
    finally:
        for child in shared:
            child.reshard()


def synchronized(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are exchanged with the last micro-batch only."""
    inner = getattr(model, "_orig_mod", model)
    if is_sharded(inner):
        inner.set_requires_gradient_sync(last)  # type: ignore[operator]
    elif isinstance(inner, DistributedDataParallel) and not last:
        return inner.no_sync()  # type: ignore[no-any-return]
    return contextlib.nullcontext()


def begins_step(config: Trained | CostRun) -> None:
    """Tells the CUDA graphs that what they gave in the last step is no longer read."""
    if config.efficiency.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
