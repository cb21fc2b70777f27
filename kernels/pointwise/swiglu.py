"""SwiGLU with a backward that keeps only its two inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import by_kernels, by_library
from ..operation import Function
from . import library
from .tiles import in_cache

SLOPE = 1.702  # sigmoid(1.702 x) is near the normal distribution function, so that x times it is near GELU


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


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The gated activation of gpt-oss (OpenAI, 2025, arXiv 2508.10925), elementwise.

        y = (clamp(up, -limit, limit) + 1) * g * sigmoid(1.702 g)        g = min(gate, limit)

    Any shape, both alike; y has their type, and is computed in float32 at least. Raises ValueError where the shapes
    differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike; got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        )
    return _ClampedSwiGLU.call(gate, up, limit)


class _ClampedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        wide = torch.promote_types(gate.dtype, torch.float32)
        g, u = gate.to(wide).clamp(max=limit), up.to(wide).clamp(-limit, limit) + 1
        return (u * g * torch.sigmoid(SLOPE * g)).to(gate.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With s = sigmoid(1.702 g):  dup = dy g s,  dgate = dy u s (1 + 1.702 g (1 - s));  0 where it is clamped."""
        gate, up = ctx.saved_tensors
        wide = torch.promote_types(gate.dtype, torch.float32)
        g, u, dy = gate.to(wide).clamp(max=ctx.limit), up.to(wide).clamp(-ctx.limit, ctx.limit) + 1, dy.to(wide)
        s = torch.sigmoid(SLOPE * g)
        dgate = (dy * u * s * (1 + SLOPE * g * (1 - s))).masked_fill(gate > ctx.limit, 0.0)
        return dgate.to(gate.dtype), (dy * g * s).masked_fill(up.abs() > ctx.limit, 0.0).to(up.dtype), None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = by_kernels("swiglu", gate)
        if ctx.kernels is not None:
            return ctx.kernels.gated(gate, up)
        return in_cache(_gated, _rows(gate, up), 1)[0].view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """With s = sigmoid(gate):  dup = dy·gate·s,  dgate = dy·up·s (1 + gate (1 − s))."""
        gate, up = ctx.saved_tensors
        if ctx.kernels is not None:
            return ctx.kernels.gated_backward(dy, gate, up)
        dgate, dup = in_cache(_gradients, _rows(dy, gate, up), 2)
        return dgate.view(gate.shape), dup.view(up.shape)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1) for x in tensors)


def _gated(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (F.silu(gate).mul_(up),)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
