"""SwiGLU with a backward that keeps only its two inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import by_kernels, by_library
from ..operation import Function
from . import library


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, elementwise (Shazeer, 2020, arXiv 2002.05202).

    Any shape, both alike; y has their type. Raises ValueError where the shapes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike; got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        )
    if by_library("swiglu", gate):
        return library.swiglu(gate, up)
    return _SwiGLU.call(gate, up)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = by_kernels("swiglu", gate)
        if ctx.kernels is not None:
            return ctx.kernels.gated(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """With s = sigmoid(gate):  dup = dy·gate·s,  dgate = dy·up·s (1 + gate (1 − s))."""
        gate, up = ctx.saved_tensors
        if ctx.kernels is not None:
            return ctx.kernels.gated_backward(dy, gate, up)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)
