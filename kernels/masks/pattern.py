"""Pattern: which keys a query may see, as bands of positions; counts, intervals and tiles are derived from these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..derived import Deriving
from ..documents import Documents, Run
from ..plain import Plain

FAR = 1 << 30
"""A distance that no two positions are apart."""

Intervals = list[tuple[int, int]]


class Band(NamedTuple):
    """Keys j of a query i: first <= j < last and i − back <= j <= i + ahead, where i − j is a multiple of `stride`."""

    first: int = 0
    last: int = FAR
    back: int = FAR
    ahead: int = FAR
    stride: int = 1

    def overlaps(self, other: Band) -> bool:
        """Whether both bands can have one pair of positions."""
        if max(self.first, other.first) >= min(self.last, other.last):
            return False
        nearest, farthest = max(-self.ahead, -other.ahead), min(self.back, other.back)  # of i − j
        stride = math.lcm(self.stride, other.stride)
        return farthest // stride * stride >= nearest

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """The key positions start..stop as far as they lie between `first` and `last`."""
        return max(self.first, start), min(self.last, stop)

    def pairs(self, query: Run, key: Run) -> int:
        """How many (query, key) pairs of two runs of one document are visible, in closed form."""
        low, high = self.within(key.position, key.end_position)
        total = 0
        for rest in range(self.stride):  # positions of one remainder are a band without a stride
            queries = _multiples(query.position, query.end_position, rest, self.stride)
            keys = _multiples(low, high, rest, self.stride)
            total += _at_or_below(queries, keys, self.ahead // self.stride)
            total -= _at_or_below(queries, keys, -(self.back // self.stride) - 1)
        return total

    def count(self, query: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """How many of the key positions start..stop each query position sees."""
        low = start.clamp(min=self.first) if self.first else start
        high = stop.clamp(max=self.last) if self.last < FAR else stop
        low = torch.maximum(low, query - self.back) if self.back < FAR else low
        high = torch.minimum(high, query + (self.ahead + 1)) if self.ahead < FAR else high
        if self.stride > 1:
            low = low + (query - low) % self.stride
            return ((high - low + self.stride - 1) // self.stride).clamp(min=0)
        return (high - low).clamp(min=0)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query positions i see key positions j, of whatever shape both broadcast to."""
        ahead = j - i
        seen = ahead <= self.ahead
        if self.back < FAR:
            seen &= ahead >= -self.back
        if self.first:
            seen &= j >= self.first
        if self.last < FAR:
            seen &= j < self.last
        if self.stride > 1:
            seen &= ahead % self.stride == 0
        return seen


class Pattern(Plain, ABC):
    """A static predicate over the positions of a query i and a key j of one document; never over indices.

    A pattern is a frozen dataclass that states its `bands`; no pair is in two of them. All else is derived: every
    backend, strategy and decoder runs it. Padding neither sees nor is seen. Raises ValueError for bands that overlap.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for one, other in combinations(self.bands, 2):
            if one.overlaps(other):
                raise ValueError(f"bands must not share a pair of positions; got {one} and {other}. Cut one of them")

    @property
    @abstractmethod
    def bands(self) -> tuple[Band, ...]:
        """The visible pairs, each in one band."""

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """bool `[..., Tq, Tk]` for positions `[..., Tq]` and `[..., Tk]` of one document."""
        i, j = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        seen = self.bands[0].visible(i, j)
        for band in self.bands[1:]:
            seen |= band.visible(i, j)
        return seen

    def dense(self, queries: Documents, keys: Documents, device: torch.device | str = "cpu") -> Tensor:
        """bool `[B, Tq, Tk]`: the whole predicate, for references and tests."""
        q_ids, k_ids = queries.ids(device), keys.ids(device)
        same = (q_ids.unsqueeze(-1) == k_ids.unsqueeze(-2)) & (q_ids >= 0).unsqueeze(-1)
        return same & self.visible(queries.positions(device), keys.positions(device))

    def pairs(self, query: Run, key: Run) -> int:
        """How many (query, key) pairs of two runs of one document are visible, in closed form."""
        return sum(band.pairs(query, key) for band in self.bands)

    def count(self, query: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """How many of the key positions start..stop each query position sees."""
        counts = [band.count(query, start, stop) for band in self.bands]
        return torch.stack(counts).sum(0) if len(counts) > 1 else counts[0]

    def keys_of(self, start: int, stop: int) -> tuple[Intervals, Intervals]:
        """Intervals that contain all key positions that any query of positions start..stop sees, and intervals of those
        that all of these queries see."""
        some, every = [], []
        for band in self.bands:
            some.append((max(band.first, start - band.back), min(band.last, stop + band.ahead)))
            if band.stride == 1:
                every.append((max(band.first, stop - 1 - band.back), min(band.last, start + band.ahead + 1)))
        return union(some), union(every)

    def queries_of(self, start: int, stop: int) -> tuple[Intervals, Intervals]:
        """Intervals that contain all query positions that see any key of positions start..stop, and intervals of those
        that see all of these keys."""
        some = []
        for band in self.bands:
            low, high = band.within(start, stop)
            if low < high:
                some.append((low - band.ahead, high + band.back))
        borders = sorted({start, stop, *(b for band in self.bands for b in band[:2] if start < b < stop)})
        every: Intervals = [(-FAR, FAR)]
        for low, high in pairwise(borders):
            bands = [band for band in self.bands if band.within(low, high) == (low, high) and band.stride == 1]
            every = intersection(every, union([(high - 1 - band.ahead, low + band.back + 1) for band in bands]))
        return union(some), every

    def kept(self, length: int) -> Intervals:
        """Which of the first `length` positions queries after them can see: what a decoding cache has to keep."""
        return union([(max(band.first, length - band.back), min(band.last, length)) for band in self.bands])

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        """The work of `queries` against `keys`; None where the pattern leaves none: no send or call is needed then."""
        pieces = tuple(self._pieces(queries, keys))
        return Tile(self, pieces, queries, keys) if pieces else None

    def reaches(self, queries: Documents, keys: Documents) -> bool:
        """Whether any query sees any key: what `tile` says, without listing it."""
        return next(self._pieces(queries, keys), None) is not None

    def _pieces(self, queries: Documents, keys: Documents) -> Iterator[Piece]:
        for row, (query_runs, key_runs) in enumerate(zip(queries.runs, keys.runs, strict=True)):
            by_document: dict[int, list[Run]] = {}
            for run in key_runs:
                if not run.is_padding:
                    by_document.setdefault(run.document, []).append(run)
            for query in query_runs:
                for key in by_document.get(query.document, ()):
                    if self.pairs(query, key):
                        yield Piece(row, query, key)


@dataclass(frozen=True)
class Bands(Pattern):
    """The pattern of the bands that are passed."""

    listed: tuple[Band, ...]

    @property
    def bands(self) -> tuple[Band, ...]:
        return self.listed


class Piece(NamedTuple):
    """Queries and keys of one document in one row: where they stand among the tokens, and their positions."""

    row: int
    query: Run
    key: Run


@dataclass(frozen=True)
class Tile(Deriving):
    """The work of some queries against some keys, cut into nonempty pieces of one document each.

    What backends need of a tile, such as lists of blocks, is derived from it.
    """

    mask: Pattern
    pieces: tuple[Piece, ...]
    queries: Documents
    keys: Documents

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs: what attention costs, whatever the packing."""
        return sum(self.mask.pairs(piece.query, piece.key) for piece in self.pieces)


def union(intervals: Intervals) -> Intervals:
    """The same numbers as sorted intervals that do not touch; empty ones are left out."""
    joined: Intervals = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def intersection(one: Intervals, other: Intervals) -> Intervals:
    """What is in both of two unions of intervals."""
    return union([(max(a, c), min(b, d)) for a, b in one for c, d in other])


def _multiples(start: int, stop: int, rest: int, stride: int) -> tuple[int, int]:
    """The numbers n for which n · stride + rest is in start..stop."""
    return -((rest - start) // stride), -((rest - stop) // stride)


def _at_or_below(queries: tuple[int, int], keys: tuple[int, int], shift: int) -> int:
    """Σ over i in `queries` of the number of j in `keys` with j <= i + shift."""
    (low, high), (first, last) = keys, (queries[0] + shift, queries[1] + shift)
    if high <= low or last <= first:
        return 0
    total = max(0, last - max(first, high)) * (high - low)  # queries at or beyond `high` see all
    rise_low, rise_high = max(first, low), min(last, high)  # in between a query at i sees i − low + 1
    if rise_high > rise_low:
        total += (rise_high - rise_low) * (rise_low - low + 1 + rise_high - low) // 2
    return total
