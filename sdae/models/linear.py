"""Linear layers that run at the CPU's peak.

In float32 on the CPU, oneDNN's matrix product with its bias inside is faster than what `F.linear` calls there
(benchmarks/changes.py); the weight's gradient is not, and stays with the plain product. Elsewhere, and
where this PyTorch lacks the operator, the layer is `nn.Linear` to the letter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _onednn() -> Any:
    """PyTorch's oneDNN linear operator, which inductor's CPU code is made of, or None."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR = _onednn()
_enabled = True


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, every layer is `nn.Linear`: for counting FLOP, and for measuring what the fast path is worth."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _LINEAR(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _LINEAR(gradient, weight.t(), None, "none", [], "") if wants_x else None,
            flat.t() @ x.flatten(0, -2) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


class Linear(nn.Linear):
    """A linear layer; in float32 on a CPU oneDNN's product with its bias inside, which is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if _LINEAR is None or not (_enabled and _is_float32_on_cpu(x)):
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]
        return _LINEAR(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _is_float32_on_cpu(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu")


def speed_up(module: nn.Module) -> None:
    """Lets every linear layer of a module take the fast path; names and weights stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
