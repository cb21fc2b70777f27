"""Calls: how a tile is cut for libraries, which take packed sequences and count limits from the last query and key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..documents import Run
from ..mask import Mask, Piece, Tile

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


def _spans(mask: Mask, piece: Piece) -> Iterator[tuple[tuple[int, int], Span]]:
    """Limits and span of what a piece's mask leaves: sinks and window apart, without tokens that see nothing."""
    row, query, key = piece
    if mask.window is None:
        windows: list[tuple[int, int, int | None]] = [(key.position, key.end_position, None)]
    else:
        behind = min(max(mask.sink_tokens, key.position), key.end_position)
        windows = [(key.position, behind, None), (behind, key.end_position, mask.window)]
    for c, d, window in windows:
        a, b = query.position, query.end_position
        if mask.causal:
            a, d = max(a, c), min(d, b)
        if window is not None:
            b, c = min(b, d - 1 + window), max(c, a - window + 1)
        if a < b and c < d:
            yield _limits(mask.causal, window, a, b, c, d), Span(row, _held(query, a, b), _held(key, c, d))


def _limits(causal: bool, window: int | None, a: int, b: int, c: int, d: int) -> tuple[int, int]:
    """(left, right) for queries at positions a..b and keys at c..d <= b, counted from the last query and key."""
    reach = UNLIMITED if window is None or b - 1 - c < window else window - 1 - (b - d)
    ahead = UNLIMITED if not causal or d - 1 <= a else b - d
    # With a limit on one side alone the other one is unlimited; with none every pair is visible.
    return reach, ahead


def _held(run: Run, first: int, stop: int) -> tuple[int, int]:
    shift = run.start - run.position
    return first + shift, stop + shift
