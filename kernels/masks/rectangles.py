"""Tiling: cuts a tile into rectangles whose mask is trivial, causal from the corner, or a band."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..documents import Run
from .pattern import FAR, Pattern, Tile

NARROW = 512  # windows up to this many keys are cut into bands alone


class Rectangle(NamedTuple):
    """Rows, queries and keys (half-open index ranges) that one call of an attention routine takes.

    Every query sees at least one key of its rectangle, so that every log-sum-exp is finite. `shape` is "full" (all
    pairs are visible), "causal" (a square: query n sees keys 0..n) or "band" (query n sees key m where
    0 <= lead + n − m < window).
    """

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    shape: str
    lead: int = 0
    window: int = 0


class _Cut(NamedTuple):
    """A rectangle in positions: queries a..b, keys c..d."""

    a: int
    b: int
    c: int
    d: int
    shape: str
    lead: int = 0
    window: int = 0


def rectangles(tile: Tile, limit: int | None = None) -> Iterator[Rectangle]:
    """Covers every visible pair of the tile once; neighbouring rows that are packed alike share their rectangles.

    Full and causal rectangles have at most `limit` queries and keys, if it is not None. The invisible pairs that
    they contain are those above the diagonal of causal squares and those at the borders of bands, so that the work
    follows the visible pairs, however the row is packed.
    """
    for rows, pieces in _alike_rows(tile):
        for query, key in pieces:
            to_index, to_key = query.start - query.position, key.start - key.position
            for cut in _cut(tile.mask, query, key):
                for a, b, c, d, shape, lead, window in _limited(cut, limit):
                    queries, keys = (a + to_index, b + to_index), (c + to_key, d + to_key)
                    yield Rectangle(rows, queries, keys, shape, *((lead, window) if shape == "band" else ()))


def _alike_rows(tile: Tile) -> Iterator[tuple[tuple[int, int], tuple[tuple[Run, Run], ...]]]:
    """Ranges of neighbouring rows with the same pieces up to the documents' ids, and those pieces."""
    by_row: dict[int, list[tuple[Run, Run]]] = {}
    for piece in tile.pieces:
        runs = piece.query._replace(document=0), piece.key._replace(document=0)
        by_row.setdefault(piece.row, []).append(runs)
    start, stop, shared = 0, 0, None
    for row, pieces in sorted(by_row.items()):
        if shared is not None and (row != stop or pieces != shared):
            yield (start, stop), tuple(shared)
            shared = None
        if shared is None:
            start, shared = row, pieces
        stop = row + 1
    if shared is not None:
        yield (start, stop), tuple(shared)


def _cut(mask: Pattern, query: Run, key: Run) -> Iterator[_Cut]:
    """The rectangles of every band. Keys are counted from `ahead` of them on: a band is causal then, or a window."""
    a, b = query.position, query.end_position
    for band in mask.bands:
        c, d = band.within(key.position, key.end_position)
        if c >= d:
            continue
        if d - 1 - a <= band.ahead and b - 1 - c <= band.back:
            yield _Cut(a, b, c, d, "full")
            continue
        ahead = band.ahead if band.ahead < FAR else d - 1 - a
        for cut in _window(a, b, c - ahead, d - ahead, band.back + ahead + 1):
            yield cut._replace(c=cut.c + ahead, d=cut.d + ahead, lead=cut.a - cut.c)


def _causal(a: int, b: int, c: int, d: int) -> Iterator[_Cut]:
    """Keys before the first query, the square on the diagonal, and the square's keys for the queries behind it."""
    if b - a == 1:
        if c < min(b, d):
            yield _Cut(a, b, c, min(b, d), "full")
        return
    if c < min(a, d):
        yield _Cut(a, b, c, min(a, d), "full")
    low, high = max(a, c), min(b, d)
    if low < high:
        yield _Cut(low, high, low, high, "causal")
        if high < b:
            yield _Cut(high, b, low, high, "full")


def _window(a: int, b: int, c: int, d: int, window: int) -> Iterator[_Cut]:
    """Blocks of queries against their keys: in one band where the window is narrow, since calls and merges cost more
    than a few hidden pairs; else the keys that leave the window inside the block, those that all see, the diagonal.
    """
    if c >= d:
        return
    if b - c <= window:  # the last query still sees the first key
        yield from _causal(a, b, c, d)
        return
    step = min(max(window // 4, 64), 512)
    first, last = max(a, c), min(b, d + window - 1)
    for low in range(first, last, step):
        high = min(low + step, last)
        oldest, kept = max(c, low - window + 1), max(c, high - window)
        if window <= NARROW or high - low > window:
            shape = "band" if high - low > 1 else "full"
            yield _Cut(low, high, oldest, min(d, high), shape, window=window)
            continue
        if oldest < kept:
            leaving = min(kept, d)
            yield _Cut(low, min(high, leaving + window - 1), oldest, leaving, "band", window=window)
        if kept < d:
            yield from _causal(low, high, kept, min(d, high))


def _limited(cut: _Cut, limit: int | None) -> Iterator[_Cut]:
    a, b, c, d, shape, *_ = cut
    if limit is None or shape == "band" or (b - a <= limit and d - c <= limit):
        yield cut
        return
    for low in range(a, b, limit):
        high = min(low + limit, b)
        diagonal = c + low - a if shape == "causal" else d
        for left in range(c, diagonal, limit):
            yield _Cut(low, high, left, min(left + limit, diagonal), "full")
        if shape == "causal":
            yield _Cut(low, high, diagonal, c + high - a, "causal")
