"""Softmax attention by rectangles: fused where the device has a kernel, and never a whole matrix of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attend import Gradient, merge_weight
from ..dispatch import kind_of
from ..masks import Tile
from ..masks.rectangles import rectangles
from .rectangle import FlashRectangles, PlainRectangles

Routine = type[FlashRectangles] | type[PlainRectangles]


def routine_for(device: torch.device, logits: dict[str, Any]) -> Routine:
    """Which routine computes a rectangle on `device`, with what the logits need besides a scale."""
    return FlashRectangles if kind_of(device) == "cpu" and not logits else PlainRectangles


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, routine: Routine | None = None, **logits: Any
) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend`. Rectangles merge into (out, lse) in the order of the tile's cut.

    logits: softcap and levels, as `PlainRectangles` takes them.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    routine = routine or routine_for(q.device, logits)
    inside = routine(q, k, v, scale=scale, **logits)
    rows, written = (0, 0), bytearray()
    for at in rectangles(tile, inside.limit):
        if at.rows != rows:
            rows, written = at.rows, bytearray(q.shape[1])
        first, last = at.queries
        place = slice(*at.rows), slice(first, last)
        out_part, lse_part = inside.forward(at)
        if written.find(1, first, last) < 0:  # no earlier result to merge with
            out[place], lse[place] = out_part, lse_part
        else:
            out[place].lerp_(out_part, merge_weight(lse[place], lse_part).unsqueeze(-1))
            lse[place] = torch.logaddexp(lse[place], lse_part)
        written[first:last] = b"\x01" * (last - first)
    return out, lse


def attend_backward(
    gradient: Gradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile: Tile,
    scale: float,
    routine: Routine | None = None,
    **logits: Any,
) -> tuple[Tensor, ...]:
    """See `longreach.kernels.softmax.attend_backward`. Sums in the order of the tile's cut: the same at every run.

    The gradient of the levels of keys comes last, where there are levels.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = (k, v, logits["levels"][1]) if "levels" in logits else (k, v)
    sums = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, *keys)]
    routine = routine or routine_for(q.device, logits)
    inside = routine(q, k, v, scale=scale, gradient=gradient, **logits)
    for at in rectangles(tile, inside.limit):
        parts = inside.backward(at)
        if (at.rows, at.queries, at.keys) == ((0, q.shape[0]), (0, q.shape[1]), (0, k.shape[1])):  # the only rectangle
            return tuple(part.contiguous() for part in parts)
        for total, part, span in zip(sums, parts, (at.queries, *[at.keys] * len(keys)), strict=True):
            total[slice(*at.rows), slice(*span)] += part
    return tuple(sums)
