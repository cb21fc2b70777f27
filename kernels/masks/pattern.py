"""Pattern: which keys a query may see, as bands of positions; counts, intervals and tiles are derived from these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..derived import Deriving
from ..documents import Documents, Runs, expanded, key_of
from ..plain import Plain

FAR = 1 << 30
"""A distance that no two positions are apart."""

Intervals = list[tuple[int, int]]
Ranges = list[tuple[Tensor, Tensor]]
"""Half-open ranges, each of as many numbers as there are starts and stops."""


class Band(NamedTuple):
    """Keys j of a query i: first <= j < last and i − back <= j <= i + ahead, where i − j is a multiple of `stride`, and
    where ⌊i / block⌋ = ⌊j / block⌋."""

    first: int = 0
    last: int = FAR
    back: int = FAR
    ahead: int = FAR
    stride: int = 1
    block: int = FAR

    @property
    def is_plain(self) -> bool:
        """Whether it has neither a stride nor blocks."""
        return self.stride == 1 and self.block == FAR

    def overlaps(self, other: Band) -> bool:
        """Whether both bands can have one pair of positions."""
        if max(self.first, other.first) >= min(self.last, other.last):
            return False
        within = min(self.block, other.block) - 1  # positions of one block are no farther apart
        nearest = max(-self.ahead, -other.ahead, -within)  # of i − j
        farthest = min(self.back, other.back, within)
        stride = math.lcm(self.stride, other.stride)
        return farthest // stride * stride >= nearest

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """The key positions start..stop as far as they lie between `first` and `last`."""
        return max(self.first, start), min(self.last, stop)

    def pairs(self, queries: Runs, keys: Runs) -> Tensor:
        """How many (query, key) pairs are visible, in closed form: of each run and the run of keys beside it."""
        if self.block < FAR:
            owner, cut, others = _in_blocks(Reach.of(queries), Reach.of(keys), self.block)
            of_blocks = self._replace(block=FAR).pairs(cut.runs, others.runs)
            return torch.zeros_like(queries.position).index_add_(0, owner, of_blocks)
        low, high = keys.position.clamp(min=self.first), keys.end_position.clamp(max=self.last)
        total = torch.zeros_like(low)
        for rest in range(self.stride):  # positions of one remainder are a band without a stride
            queries_at = _multiples(queries.position, queries.end_position, rest, self.stride)
            keys_at = _multiples(low, high, rest, self.stride)
            total += _at_or_below(queries_at, keys_at, self.ahead // self.stride)
            total -= _at_or_below(queries_at, keys_at, -(self.back // self.stride) - 1)
        return total

    def any_pair(self, queries: Reach, keys: Reach) -> Tensor:
        """bool: whether any query of positions start..stop sees any of the keys of positions start..stop beside it."""
        if self.block < FAR:
            owner, cut, others = _in_blocks(queries, keys, self.block)
            seen = self._replace(block=FAR).any_pair(cut, others)
            return torch.zeros_like(queries.start).index_add_(0, owner, seen.long()) > 0
        start, stop = keys.start.clamp(min=self.first), keys.stop.clamp(max=self.last)
        nearest = (queries.start - stop + 1).clamp(min=-self.ahead)  # of i − j, every number between is one of a pair
        farthest = (queries.stop - 1 - start).clamp(max=self.back)
        if self.stride > 1:
            farthest = farthest // self.stride * self.stride
        return (farthest >= nearest) & (start < stop)

    def count(self, query: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """How many of the key positions start..stop each query position sees."""
        low = start.clamp(min=self.first) if self.first else start
        high = stop.clamp(max=self.last) if self.last < FAR else stop
        low = torch.maximum(low, query - self.back) if self.back < FAR else low
        high = torch.minimum(high, query + (self.ahead + 1)) if self.ahead < FAR else high
        if self.block < FAR:
            begin = query // self.block * self.block
            low, high = torch.maximum(low, begin), torch.minimum(high, begin + self.block)
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
        if self.block < FAR:
            seen &= i // self.block == j // self.block
        return seen

    def in_blocks(self, low: Tensor, high: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """The positions low..high, as far as they are in the blocks of positions start..stop."""
        if self.block == FAR:
            return low, high
        first, last = start // self.block, (stop - 1) // self.block
        return torch.maximum(low, first * self.block), torch.minimum(high, (last + 1) * self.block)

    def in_one_block(self, low: Tensor, high: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """As `in_blocks` where start..stop are all in one block; nothing elsewhere."""
        low, high = self.in_blocks(low, high, start, stop)
        return low, high if self.block == FAR else torch.where(
            start // self.block == (stop - 1) // self.block, high, low
        )


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

    def pairs(self, queries: Runs, keys: Runs) -> Tensor:
        """How many (query, key) pairs are visible, int64, of each run and the run of keys of its document beside it."""
        return sum((band.pairs(queries, keys) for band in self.bands), torch.zeros_like(queries.position))

    def any_pair(self, queries: Reach, keys: Reach) -> Tensor:
        """bool: whether any query of positions start..stop sees any of the keys of positions start..stop beside it."""
        seen = torch.zeros_like(queries.start, dtype=torch.bool)
        for band in self.bands:
            seen |= band.any_pair(queries, keys)
        return seen

    def count(self, query: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """How many of the key positions start..stop each query position sees."""
        counts = [band.count(query, start, stop) for band in self.bands]
        return torch.stack(counts).sum(0) if len(counts) > 1 else counts[0]

    def keys_of(self, start: Tensor, stop: Tensor) -> tuple[Ranges, Ranges]:
        """Ranges that contain all key positions that any query of positions start..stop sees, and ranges of those that
        all of these queries see. Ranges may be empty, and may overlap."""
        some, every = [], []
        for band in self.bands:
            low, high = (start - band.back).clamp(min=band.first), (stop + band.ahead).clamp(max=band.last)
            some.append(band.in_blocks(low, high, start, stop))
            if band.stride == 1:
                low, high = stop - 1 - band.back, start + band.ahead + 1
                low, high = low.clamp(min=band.first), high.clamp(max=band.last)
                every.append(band.in_one_block(low, high, start, stop))
        return some, every

    def queries_of(self, start: Tensor, stop: Tensor) -> tuple[Ranges, Ranges]:
        """Ranges that contain all query positions that see any key of positions start..stop, and ranges of those that
        see all of these keys. Ranges may be empty, and may overlap."""
        some = []
        for band in self.bands:
            low, high = start.clamp(min=band.first), stop.clamp(max=band.last)
            inside = low < high
            some_low, some_high = band.in_blocks(low - band.ahead, high + band.back, low, high)
            some.append((torch.where(inside, some_low, 0), torch.where(inside, some_high, 0)))
        borders = sorted({0, FAR, *(border for band in self.bands for border in band[:2])})
        every: Ranges = [(torch.full_like(start, -FAR), torch.full_like(stop, FAR))]
        for first, last in pairwise(borders):  # keys first..last are in the same bands, and all of them must be seen
            low, high = start.clamp(min=first), stop.clamp(max=last)
            of_part = []
            for band in self.bands:
                if band.first <= first and last <= band.last and band.stride == 1:
                    of_part.append(band.in_one_block(high - 1 - band.ahead, low + band.back + 1, low, high))
            absent = low >= high
            every = [
                (torch.where(absent, a, torch.maximum(a, c)), torch.where(absent, b, torch.minimum(b, d)))
                for a, b in every
                for c, d in of_part or [(torch.full_like(start, FAR), torch.full_like(stop, -FAR))]
            ]
        return some, every

    def kept(self, length: int) -> Intervals:
        """Which of the first `length` positions queries after them can see: what a decoding cache has to keep."""
        begins = [max(band.first, length - band.back, length // band.block * band.block) for band in self.bands]
        return union([(begin, min(band.last, length)) for begin, band in zip(begins, self.bands, strict=True)])

    def most_kept(self, length: int, beginnings: int = 1) -> int:
        """At most so many of `length` columns are kept at any time, of rows whose position 0 is in so many columns."""
        total = 0
        for band in self.bands:
            each = min(min(band.last, length) - band.first, band.back, band.block - 1)
            moves = band.last >= length and band.block >= length  # a window ends where all rows have come to
            total += max(0, each) * (1 if moves else beginnings)
        return min(total, length)

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        """The work of `queries` against `keys`; None where the pattern leaves none: no send or call is needed then."""
        pieces = joined(queries.columns, keys.columns)
        some = self.any_pair(*map(Reach.of, pieces))
        if not bool(some.any()):
            return None
        pieces = Pieces(*(runs.at(some) for runs in pieces))
        return Tile(self, pieces, queries, keys)

    def reaches(self, queries: Documents, keys: Documents) -> bool:
        """Whether any query sees any key."""
        return bool(self.any_pair(*map(Reach.of, joined(queries.columns, keys.columns))).any())

    def reached(self, parts: Documents, number: int) -> Tensor:
        """bool `[P, P]`: whether any query of part i sees any key of part j, of `number` parts of the same rows one
        after the other along the batch."""
        pairs, queries, keys = parts.derive(_runs_of_parts, number)
        reached = torch.zeros(number * number, dtype=torch.bool, device="cpu")
        reached[pairs[self.any_pair(queries, keys)]] = True
        return reached.view(number, number)


@dataclass(frozen=True)
class Bands(Pattern):
    """The pattern of the bands that are passed."""

    listed: tuple[Band, ...]

    @property
    def bands(self) -> tuple[Band, ...]:
        return self.listed


class Pieces(NamedTuple):
    """Queries and keys of one document in one row, as runs side by side."""

    queries: Runs
    keys: Runs


@dataclass(frozen=True, eq=False)
class Tile(Deriving):
    """The work of some queries against some keys, cut into nonempty pieces of one document each.

    What backends need of a tile, such as lists of blocks, is derived from it.
    """

    mask: Pattern
    pieces: Pieces
    queries: Documents
    keys: Documents

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs: what attention costs, whatever the packing."""
        return self.derive(_pairs)


class Reach(NamedTuple):
    """The positions start..stop of runs, int64."""

    start: Tensor
    stop: Tensor

    @classmethod
    def of(cls, runs: Runs) -> Reach:
        return cls(runs.position, runs.end_position)

    @property
    def runs(self) -> Runs:
        """Runs of these positions, of no document and nowhere in a row."""
        nowhere = torch.zeros_like(self.start)
        return Runs(nowhere, nowhere, nowhere, self.stop - self.start, self.start)


def _in_blocks(queries: Reach, keys: Reach, size: int) -> tuple[Tensor, Reach, Reach]:
    """Both cut where blocks of `size` positions begin: of each block that has both queries and keys, the line of which
    it is, its queries and its keys."""
    first = torch.maximum(queries.start, keys.start) // size
    last = (torch.minimum(queries.stop, keys.stop) - 1) // size
    owner, place = expanded((last - first + 1).clamp(min=0))
    begin = (first[owner] + place) * size
    cut = [Reach(torch.maximum(x.start[owner], begin), torch.minimum(x.stop[owner], begin + size))
           for x in (queries, keys)]  # fmt: skip
    return owner, cut[0], cut[1]


def _pairs(tile: Tile) -> int:
    return int(tile.mask.pairs(*tile.pieces).sum())


def _runs_of_parts(parts: Documents, number: int) -> tuple[Tensor, Reach, Reach]:
    """Every run of a part beside every run, of any part, of its document and row: i · P + j for parts i and j."""
    batch = parts.batch // number
    part, runs = parts.columns.row // batch, parts.columns._replace(row=parts.columns.row % batch)
    queries, keys = joined_lines(runs, runs)
    every = Reach.of(runs)
    return part[queries] * number + part[keys], Reach(*(x[queries] for x in every)), Reach(*(x[keys] for x in every))


def joined(queries: Runs, keys: Runs) -> Pieces:
    """Every run of queries beside every run of keys of its document and row."""
    of_queries, of_keys = joined_lines(queries, keys)
    return Pieces(queries.at(of_queries), keys.at(of_keys))


def joined_lines(queries: Runs, keys: Runs) -> tuple[Tensor, Tensor]:
    """The lines of `joined`, int64: in the order of the queries, then of the keys."""
    ordered, order = key_of(keys).sort(stable=True)
    wanted = key_of(queries)
    first = torch.searchsorted(ordered, wanted)
    number = torch.where(queries.real, torch.searchsorted(ordered, wanted, right=True) - first, 0)
    of_queries, place = expanded(number)
    return of_queries, order[first[of_queries] + place]


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


def _multiples(start: Tensor, stop: Tensor, rest: int, stride: int) -> tuple[Tensor, Tensor]:
    """The numbers n for which n · stride + rest is in start..stop."""
    return -((rest - start) // stride), -((rest - stop) // stride)


def _at_or_below(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], shift: int) -> Tensor:
    """Σ over i in `queries` of the number of j in `keys` with j <= i + shift."""
    (low, high), (first, last) = keys, (queries[0] + shift, queries[1] + shift)
    total = (last - torch.maximum(first, high)).clamp(min=0) * (high - low)  # queries at or beyond `high` see all
    rise_low = torch.maximum(first, low)
    rising = (torch.minimum(last, high) - rise_low).clamp(min=0)  # in between a query at i sees i − low + 1
    total += rising * (2 * (rise_low - low) + 1 + rising) // 2
    return torch.where((high > low) & (last > first), total, 0)
