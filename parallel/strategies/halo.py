"""Halo: the last rows of the spans before each span, for convolutions, shifts and windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import Gathering, in_row_order, sum_over_ranks
from ..operation import OfOneTensor, mix
from ..sequence import Sequence


@dataclass(frozen=True)
class Halo(OfOneTensor):
    """The `width` rows before each folded span: `[spans * B, L, …]` to `[spans * B, width, …]`.

    Rows before the start of the row are zero. Spans shorter than `width` take their halo from several spans. An
    `Operation`: one all-gather of `spans * min(width, L)` rows forward; backward one all-reduce of all spans' such
    rows, whose gradients are added up at the spans that own them.
    """

    width: int

    def apply(self, x: Tensor, seq: Sequence) -> Tensor:
        return _halo_forward(x, seq, self.width)

    def transpose(self, dout: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        layout, batch, length = seq.layout, x.shape[0] // seq.layout.spans, x.shape[1]
        tail = min(self.width, length)
        dtails = dout.new_zeros(layout.ranks * layout.spans, batch, tail, *x.shape[2:])
        for span, part in zip(layout.spans_of(seq.rank), dout.chunk(layout.spans, dim=0), strict=True):
            for before, rows, source in _halo_parts(span, self.width, tail):
                dtails[before, :, source] += part[:, rows]
        sum_over_ranks(dtails, seq)
        dx = dout.new_zeros(x.shape)
        mine = torch.stack([dtails[span] for span in layout.spans_of(seq.rank)])
        dx[:, length - tail :] = mine.flatten(0, 1)
        return dx

    def shape(self, x: Tensor, ranks: int, spans: int) -> tuple[int, ...]:
        return (x.shape[0], self.width, *x.shape[2:])


def _halo_parts(span: int, width: int, tail: int) -> list[tuple[int, slice, slice]]:
    """Which rows of a span's halo come from which earlier span's tail, nearest first: (span, halo rows, tail rows)."""
    parts, filled, before = [], 0, span - 1
    while filled < width and before >= 0:
        take = min(tail, width - filled)
        parts.append((before, slice(width - filled - take, width - filled), slice(tail - take, tail)))
        filled += take
        before -= 1
    return parts


def _halo_forward(x: Tensor, seq: Sequence, width: int) -> Tensor:
    layout = seq.layout
    tail = min(width, x.shape[1])
    mine = x[:, x.shape[1] - tail :].unflatten(0, (layout.spans, -1))
    tails = in_row_order(Gathering(mine, seq).wait(), seq)
    halo = x.new_zeros(layout.spans, mine.shape[1], width, *x.shape[2:])
    for turn, span in enumerate(layout.spans_of(seq.rank)):
        for before, rows, source in _halo_parts(span, width, tail):
            halo[turn, :, rows] = tails[before][:, source]
    return halo.flatten(0, 1)


def halo(x: Tensor, seq: Sequence, width: int, slot: str) -> Tensor | None:
    """The output of `Halo`, `[spans * B, width, …]`; None on one rank, whose rows have no earlier tokens."""
    if seq.layout.ranks == 1 or width == 0:
        return None
    return mix(Halo, (width,), (x,), seq, slot)[0]
