"""A factor per head: of each token, or of all of them beside something else. One pass over a CPU's memory each way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import starts
from ..operation import Function

TILE = 1 << 16  # numbers of a tile, of which a CPU's cache holds several


def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """x factor for x `[B, T, H, V]` and a factor `[B, T, H]` in any type, which is rounded to x's."""
    if _in_tiles(x):
        return _Scale.call(x, factor)
    return x * factor.to(x.dtype).unsqueeze(-1)


def add_skip(out: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """out + skip x for out, x `[B, T, H, V]` of one type and a skip `[H]` in any, which is rounded to it."""
    if _in_tiles(x):
        return _Skip.call(out, x, skip)
    return out + skip.to(x.dtype)[:, None] * x


def _in_tiles(x: Tensor) -> bool:
    return x.device.type in ("cpu", "meta") and not torch.compiler.is_compiling()


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tokens of tensors `[B, T, …]`, some at a time."""
    first = tensors[0]
    size = max(1, TILE // max(1, first.shape[2:].numel()))
    rows = [x.flatten(0, 1) for x in tensors]
    for start in starts(len(rows[0]), size, first.device):
        yield tuple(x[start : start + size] for x in rows)


class _Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor.to(x.dtype).unsqueeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, factor = ctx.saved_tensors
        dx, dfactor = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (x, factor))
        for own_dx, own_dfactor, own_dy, own_x, own in _tiles(dx, dfactor, dy, x, factor):
            torch.mul(own_dy, own.to(x.dtype).unsqueeze(-1), out=own_dx)
            own_dfactor.copy_((own_dy * own_x).sum(-1))
        return dx, dfactor


class _Skip(Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(x, skip)
        return torch.addcmul(out, x, skip.to(x.dtype)[:, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, skip = ctx.saved_tensors
        dx, factor = torch.empty(x.shape, dtype=x.dtype, device=x.device), skip.to(x.dtype)[:, None]
        total = torch.zeros(x.shape[2:], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for own_dx, own_dy, own_x in _tiles(dx, dy, x):
            torch.mul(own_dy, factor, out=own_dx)
            total += (own_dy * own_x).sum(0, dtype=total.dtype)
        return dy, dx, total.sum(-1).to(skip.dtype)
