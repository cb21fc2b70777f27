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
        layout, length = seq.layout, x.shape[1]
        tail = min(self.width, length)
        sources, targets = seq.on(dout.device, _halo_rows, self.width, tail)
        given = _rows(dout, layout.spans).index_select(0, targets)
        dtails = given.new_zeros(layout.ranks * layout.spans * tail, *given.shape[1:])
        # Where spans are shorter than the halo, several may add to one row: one after the other, in the same order.
        counts = seq.derive(_halo_counts, self.width, tail) if tail < self.width else [len(given)]
        for rows, part in zip(sources.split(counts), given.split(counts), strict=True):
            dtails.index_add_(0, rows, part)
        sum_over_ranks(dtails, seq)
        dx = dout.new_zeros(x.shape)
        dx[:, length - tail :] = _folded(dtails.unflatten(0, (layout.ranks, -1))[seq.rank], layout.spans)
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


def _halo_rows(seq: Sequence, width: int, tail: int) -> tuple[Tensor, Tensor]:
    """Where the halos of this rank's spans come from, and their rows: numbers among all tails' and all halos' rows.

    Tails are as they are gathered, rank after rank. Rows before the start of the row come from nowhere.
    """
    layout = seq.layout
    held = [span for rank in range(layout.ranks) for span in layout.spans_of(rank)]
    place = {span: number for number, span in enumerate(held)}
    sources, targets = [], []
    for turn, span in enumerate(layout.spans_of(seq.rank)):
        for before, rows, source in _halo_parts(span, width, tail):
            sources += range(place[before] * tail + source.start, place[before] * tail + source.stop)
            targets += range(turn * width + rows.start, turn * width + rows.stop)
    return torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


def _halo_counts(seq: Sequence, width: int, tail: int) -> list[int]:
    """How many rows of each of this rank's halos come from somewhere."""
    spans = seq.layout.spans_of(seq.rank)
    return [sum(rows.stop - rows.start for _, rows, _ in _halo_parts(span, width, tail)) for span in spans]


def _rows(x: Tensor, spans: int) -> Tensor:
    """`[spans * B, L, …]` as rows `[spans * L, B, …]`."""
    return x.unflatten(0, (spans, -1)).transpose(1, 2).flatten(0, 1)


def _folded(rows: Tensor, spans: int) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(0, (spans, -1)).transpose(1, 2).flatten(0, 1)


def _halo_forward(x: Tensor, seq: Sequence, width: int) -> Tensor:
    tail = min(width, x.shape[1])
    mine = _rows(x[:, x.shape[1] - tail :], seq.layout.spans)
    sources, targets = seq.on(x.device, _halo_rows, width, tail)
    tails = Gathering(mine, seq).wait().flatten(0, 1)
    halo = mine.new_zeros(seq.layout.spans * width, *mine.shape[1:])
    halo.index_copy_(0, targets, tails.index_select(0, sources))
    return _folded(halo, seq.layout.spans)


def last_rows(x: Tensor, seq: Sequence, width: int) -> Tensor:
    """The last `width` rows of the whole row, of folded spans `[spans * B, L, …]`: `[B, width, …]` on every rank.

    Rows before the start of the row are zero.
    """
    tail = min(width, x.shape[1])
    mine = x[:, x.shape[1] - tail :].unflatten(0, (seq.layout.spans, -1))
    rows = torch.cat(in_row_order(Gathering(mine, seq).wait(), seq), dim=1)
    missing = max(0, width - rows.shape[1])
    rows = rows[:, rows.shape[1] + missing - width :].contiguous()
    return torch.cat([rows.new_zeros(rows.shape[0], missing, *rows.shape[2:]), rows], dim=1) if missing else rows


def halo(x: Tensor, seq: Sequence, width: int, slot: str) -> Tensor | None:
    """The output of `Halo`, `[spans * B, width, …]`; None on one rank, whose rows have no earlier tokens."""
    if seq.layout.ranks == 1 or width == 0:
        return None
    return mix(Halo, (width,), (x,), seq, slot)[0]
