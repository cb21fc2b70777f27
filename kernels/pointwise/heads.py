"""A factor per head: of each token, or of all of them beside something else. One pass over a CPU's memory each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operation import Function
from .tiles import in_cache, on_cpu


def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """x factor for x `[B, T, H, V]` and a factor `[B, T, H]` in any type, which is rounded to x's."""
    if on_cpu(x):
        return _Scale.call(x, factor)
    return x * factor.to(x.dtype).unsqueeze(-1)


def add_skip(out: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """out + skip x for out, x `[B, T, H, V]` of one type and a skip `[H]` in any, which is rounded to it."""
    if on_cpu(x):
        return _Skip.call(out, x, skip)
    return out + skip.to(x.dtype)[:, None] * x


class _Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor.to(x.dtype).unsqueeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, factor = ctx.saved_tensors

        def of_tokens(dy: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
            return dy * factor.to(x.dtype).unsqueeze(-1), (dy * x).sum(-1).to(factor.dtype)

        dx, dfactor = in_cache(of_tokens, tuple(each.flatten(0, 1) for each in (dy, x, factor)), 2)
        return dx.view(x.shape), dfactor.view(factor.shape)


class _Skip(Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(x, skip)
        return torch.addcmul(out, x, skip.to(x.dtype)[:, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, skip = ctx.saved_tensors
        factor, wide = skip.to(x.dtype)[:, None], torch.promote_types(x.dtype, torch.float32)
        dx, total = in_cache(
            lambda dy, x: (dy * factor, (dy * x).sum(0, dtype=wide)), (dy.flatten(0, 1), x.flatten(0, 1)), 1
        )
        return dy, dx.view(x.shape), total.sum(-1).to(skip.dtype)
