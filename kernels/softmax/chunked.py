"""Softmax attention by rectangles: fused where the device has a kernel, and never a whole matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend import Gradient, merge_weight
from ..masks import Tile
from ..masks.rectangles import rectangles
from .rectangle import FlashRectangles, PlainRectangles

Routine = type[FlashRectangles] | type[PlainRectangles]


def routine_for(device: torch.device) -> Routine:
    """Which routine computes a rectangle on `device`."""
    return FlashRectangles if device.type == "cpu" else PlainRectangles


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, routine: Routine | None = None
) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend`. Rectangles merge into (out, lse) in the order of the tile's cut."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    routine = routine or routine_for(q.device)
    inside = routine(q, k, v, scale=scale)
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
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, *, tile: Tile, scale: float, routine: Routine | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `longreach.kernels.softmax.attend_backward`. Sums in the order of the tile's cut: the same at every run."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    routine = routine or routine_for(q.device)
    inside = routine(q, k, v, scale=scale, gradient=gradient)
    for at in rectangles(tile, inside.limit):
        dq_part, dk_part, dv_part = inside.backward(at)
        if (at.rows, at.queries, at.keys) == ((0, q.shape[0]), (0, q.shape[1]), (0, k.shape[1])):  # the only rectangle
            return dq_part.contiguous(), dk_part.contiguous(), dv_part.contiguous()
        rows = slice(*at.rows)
        dq[rows, slice(*at.queries)] += dq_part
        dk[rows, slice(*at.keys)] += dk_part
        dv[rows, slice(*at.keys)] += dv_part
    return dq, dk, dv
