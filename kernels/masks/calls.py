"""Calls: how a tile is cut for libraries, which take packed sequences and count limits from the last query and key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import ranks_in_groups
from .pattern import Band, Pieces, Tile

UNLIMITED = -1


class Span(NamedTuple):
    """Queries and keys (half-open index ranges in a row) in which every query sees some key."""

    row: int
    queries: tuple[int, int]
    keys: tuple[int, int]


class Call(NamedTuple):
    """Spans that one call takes; with n queries and m keys, query i sees keys i+m−n−left … i+m−n+right of its span.

    −1 is no limit. No token is in two spans of a call.
    """

    left: int
    right: int
    spans: tuple[Span, ...]

    @property
    def kind(self) -> str:
        """What a provider must be able to mask."""
        if (self.left, self.right) == (UNLIMITED, UNLIMITED):
            return "full"
        return "causal" if (self.left, self.right) == (UNLIMITED, 0) else "band"

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        return [s.queries[1] - s.queries[0] for s in self.spans], [s.keys[1] - s.keys[0] for s in self.spans]

    @property
    def is_dense(self) -> bool:
        """Whether the spans are equally long, and square where they are causal, so that they stack to a batch."""
        n, m = self.lengths
        return len({*n}) == len({*m}) == 1 and (self.kind == "full" or (self.kind == "causal" and n == m))


def plan(tile: Tile) -> tuple[Call, ...]:
    """The calls that cover every visible pair of a tile once."""
    spans = torch.cat([_expressible(_spans(band, tile.pieces)) for band in tile.mask.bands])
    if not len(spans):
        return ()
    limits = torch.unique(spans[:, :2], dim=0, return_inverse=True)[1]
    # In a call no run of queries or keys is met twice: spans that share one differ in how often it was met before.
    met = [ranks_in_groups(torch.unique(torch.stack([limits, of], 1), dim=0, return_inverse=True)[1])
           for of in spans[:, 7:].unbind(1)]  # fmt: skip
    calls, call_of = torch.unique(torch.stack([limits, *met], dim=1), dim=0, return_inverse=True)
    first = torch.full((len(calls),), len(spans)).scatter_reduce_(0, call_of, torch.arange(len(spans)), "amin")
    made = []
    for number in first.argsort().tolist():  # in the order of their first spans
        of_call = spans[call_of == number]
        left, right = of_call[0, :2].tolist()
        lines = of_call[:, 2:7].tolist()
        made.append(Call(left, right, tuple(Span(row, (a, b), (c, d)) for row, a, b, c, d in lines)))
    return tuple(made)


def _spans(band: Band, pieces: Pieces) -> Tensor:
    """Limits and spans of a band, without queries that see no key and keys that no query sees.

    int64 `[N, 9]`: left, right, row, queries from and to, keys from and to, and numbers of the runs of both.
    """
    queries, keys = pieces
    c, d = keys.position.clamp(min=band.first), keys.end_position.clamp(max=band.last)
    inside = c < d
    a, b = torch.maximum(queries.position, c - band.ahead), torch.minimum(queries.end_position, d + band.back)
    c, d = torch.maximum(c, a - band.back), torch.minimum(d, b + band.ahead)
    # Limits are counted from the last query and key; with none on either side every pair is visible.
    left = torch.where(b - 1 - c <= band.back, UNLIMITED, band.back + d - b)
    right = torch.where(d - 1 - a <= band.ahead, UNLIMITED, band.ahead + b - d)
    to_query, to_key = queries.start - queries.position, keys.start - keys.position
    runs = [(x.row << 32) + x.start for x in (queries, keys)]
    columns = [left, right, queries.row, a + to_query, b + to_query, c + to_key, d + to_key, *runs]
    return torch.stack(columns, dim=1)[inside & (a < b) & (c < d)]


def _expressible(spans: Tensor) -> Tensor:
    """The same pairs without right limits of as many keys as there are or more, which flash attention reads as none.

    Where there are more queries than keys they limit the first queries. Those come apart, with the keys that they see,
    and end with a query that sees all of these; the others have no right limit.
    """
    left, right, row, a, b, c, d, *runs = spans.unbind(1)
    beyond = right >= d - c
    if not beyond.any():
        return spans
    cut = torch.where(beyond, b - 1 - right, b)  # the first query that the limit leaves every key
    moved = torch.where(left == UNLIMITED, UNLIMITED, left + (d - 1 - c) - (cut - a) - (d - c) + (b - a))
    early = [_limit(moved, d - 1 - c), torch.zeros_like(right), row, a, cut, c, d - 1, *runs]
    start = torch.where(left == UNLIMITED, c, torch.maximum(c, d - (b - cut) - left))
    late = [_limit(left, d - start), torch.full_like(right, UNLIMITED), row, cut, b, start, d, *runs]
    apart = [torch.stack(part, dim=1)[beyond] for part in (early, late)]
    return torch.cat([spans[~beyond], *apart])


def _limit(left: Tensor, keys: Tensor) -> Tensor:
    """The left limit, or none where the last query sees all of so many keys."""
    return torch.where(left >= keys - 1, UNLIMITED, left)
