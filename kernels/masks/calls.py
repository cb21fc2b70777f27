"""Calls: how a tile is cut for libraries, which take packed sequences and count limits from the last query and key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..documents import Run
from .pattern import Pattern, Piece, Tile

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
    calls: list[tuple[tuple[int, int], list[Span], set[tuple[int, int, int]]]] = []
    for piece in tile.pieces:
        for limits, span in _spans(tile.mask, piece):
            runs = {(0, span.row, piece.query.start), (1, span.row, piece.key.start)}
            fitting = (call for call in calls if call[0] == limits and not runs & call[2])
            call = next(fitting, None)
            if call is None:
                calls.append(call := (limits, [], set()))
            call[1].append(span)
            call[2].update(runs)
    return tuple(Call(*limits, tuple(spans)) for limits, spans, _ in calls)


def _spans(mask: Pattern, piece: Piece) -> Iterator[tuple[tuple[int, int], Span]]:
    """Limits and span of each band in a piece, without queries that see no key and keys that no query sees."""
    row, query, key = piece
    for band in mask.bands:
        c, d = band.within(key.position, key.end_position)
        if c >= d:
            continue
        a, b = max(query.position, c - band.ahead), min(query.end_position, d + band.back)
        c, d = max(c, a - band.back), min(d, b + band.ahead)
        if a < b and c < d:
            # Limits are counted from the last query and key; with none on either side every pair is visible.
            left = UNLIMITED if b - 1 - c <= band.back else band.back + d - b
            right = UNLIMITED if d - 1 - a <= band.ahead else band.ahead + b - d
            yield (left, right), Span(row, _indices(query, a, b), _indices(key, c, d))


def _indices(run: Run, first: int, stop: int) -> tuple[int, int]:
    shift = run.start - run.position
    return first + shift, stop + shift
