"""Rectangles: cuts a tile into rectangles whose mask is trivial, causal from the corner, a band, or small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Run
from .pattern import FAR, Pattern, Tile

NARROW = 512  # windows up to this many keys are cut into bands alone
SHORT = 64  # runs of up to this many queries and keys are put together, in rectangles of up to twice as many


class Rectangle(NamedTuple):
    """Rows, queries and keys (half-open index ranges) that one call of an attention routine takes.

    Every query sees at least one key of its rectangle, so that every log-sum-exp is finite. `shape` is "full" (all
    pairs are visible), "causal" (a square: query n sees keys 0..n), "band" (query n sees key m where
    0 <= lead + n − m < window) or "packed" (several documents: `hidden` bool `[queries, keys]` says what is not seen).
    """

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    shape: str
    lead: int = 0
    window: int = 0
    hidden: Tensor | None = None


_Piece = tuple[Run, Run]


class _Cut(NamedTuple):
    """A rectangle in positions: queries a..b, keys c..d."""

    a: int
    b: int
    c: int
    d: int
    shape: str
    lead: int = 0
    window: int = 0


def rectangles(tile: Tile, limit: int | None = None) -> tuple[Rectangle, ...]:
    """Covers every visible pair of the tile once; neighbouring rows that are packed alike share their rectangles.

    Full and causal rectangles have at most `limit` queries and keys, if it is not None. The invisible pairs that
    they contain are those above the diagonal of causal squares, those at the borders of bands, and those between short
    documents that are put together, so that the work follows the visible pairs, however the row is packed.
    """
    return tile.derive(_rectangles, limit)


def _rectangles(tile: Tile, limit: int | None) -> tuple[Rectangle, ...]:
    listed: list[Rectangle] = []
    for rows, pieces in _alike_rows(tile):
        for group in _put_together(tile.mask, pieces):
            if len(group) > 1:
                listed.append(_packed(tile, rows, group))
                continue
            ((query, key),) = group
            to_index, to_key = query.start - query.position, key.start - key.position
            for cut in _cut(tile.mask, query, key):
                for a, b, c, d, shape, lead, window in _limited(cut, limit):
                    queries, keys = (a + to_index, b + to_index), (c + to_key, d + to_key)
                    lead, window = (lead, window) if shape == "band" else (0, 0)
                    listed.append(Rectangle(rows, queries, keys, shape, lead, window))
    return tuple(listed)


def _alike_rows(tile: Tile) -> Iterator[tuple[tuple[int, int], tuple[_Piece, ...]]]:
    """Ranges of neighbouring rows with the same pieces up to the documents' ids, and those pieces."""
    by_row: dict[int, list[_Piece]] = {}
    queries, keys = (torch.stack(runs, dim=1).tolist() for runs in tile.pieces)
    for (row, _, *query), (_, _, *key) in zip(queries, keys, strict=True):
        by_row.setdefault(row, []).append((Run(0, *query), Run(0, *key)))
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


def _put_together(mask: Pattern, pieces: tuple[_Piece, ...]) -> Iterator[list[_Piece]]:
    """Pieces in groups: short ones that follow one another together, as far as each of their queries sees some key."""
    group: list[_Piece] = []
    for query, key in pieces:
        if group:
            (first_query, first_key), (last_query, last_key) = group[0], group[-1]
            fits = (query.start, key.start) == (last_query.stop, last_key.stop)
            fits &= max(query.stop - first_query.start, key.stop - first_key.start) <= 2 * SHORT
            if not (fits and _is_short(mask, query, key)):
                yield group
                group = []
        group.append((query, key))
        if not _is_short(mask, query, key):
            yield group
            group = []
    if group:
        yield group


def _is_short(mask: Pattern, query: Run, key: Run) -> bool:
    """Whether a piece is short, and every one of its queries sees some key of it by one of the bands alone."""
    if max(query.length, key.length) > SHORT:
        return False
    for band in mask.bands:
        low, high = band.within(key.position, key.end_position)
        sees = low < high and query.position + band.ahead >= low and query.end_position - band.back <= high
        if sees and band.stride == 1:
            return True
    return False


def _packed(tile: Tile, rows: tuple[int, int], group: list[_Piece]) -> Rectangle:
    (first_query, first_key), (last_query, last_key) = group[0], group[-1]
    queries, keys = (first_query.start, last_query.stop), (first_key.start, last_key.stop)
    of_queries, of_keys = (
        torch.cat([torch.stack([torch.full((run.length,), number), torch.arange(run.length) + run.position], dim=1)
                   for number, run in enumerate(runs)])
        for runs in zip(*group, strict=True)
    )  # fmt: skip
    same = of_queries[:, None, 0] == of_keys[:, 0]
    return Rectangle(rows, queries, keys, "packed", hidden=~(same & tile.mask.visible(of_queries[:, 1], of_keys[:, 1])))


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
