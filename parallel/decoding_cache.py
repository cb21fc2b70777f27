"""DecodingCache: what decoding keeps of the tokens so far, of rows of unequal length, on one rank or on several.

The rows of a batch stand side by side in columns: the tokens that every row is fed at one time are one column. A prompt
that is shorter than others has padding before it, so that all prompts end in one column and every row goes on in the
next. So keys of all rows are written at one place, states need no place at all, and the ops, which pass padding by and
count positions by document, give each row what it gives alone. A row that has ended is padding altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.documents import PADDING, Documents, Run
from ..kernels.masks.pattern import FAR, Intervals
from .mesh import Group

SPARE = 2  # memory that grows has room for 1 / SPARE more rows than it needs: a row is copied about SPARE times in all
TURN = 256  # columns of new tokens that one rank keeps before the next rank does


class Stretch(NamedTuple):
    """Consecutive rows of memory: `length` from row `start`, the first of `column`; −1 for rows that hold nothing."""

    start: int
    length: int
    column: int


class Columns:
    """What the columns of a batch hold, and where they are kept; all parts of a cache share it.

    length: columns so far.    starts: of each row, the column of its first token; None where every row begins at 0.
    most: how many columns there will be, for memory that is made once; None where that is not known.
    rank, ranks, group: of the ranks that share the rows, each of which keeps the keys of some columns.
    shared: how many of the columns were read by all ranks together, each a part of them.
    """

    def __init__(self, starts: Iterable[int] | None, most: int | None, rank: int, ranks: int, group: Group | None):
        self.length, self.shared = 0, 0
        self.starts = None if starts is None else list(starts)
        self.most, self.rank, self.ranks, self.group = most, rank, ranks, group

    def before(self, column: int) -> list[int]:
        """How many tokens each row has before a column."""
        return [max(0, column - start) if start < FAR else 0 for start in self.starts or [0]]

    def holder(self) -> int:
        """The rank that keeps the keys of the next columns."""
        return (self.length - self.shared) // TURN % self.ranks

    def documents(self, batch: int, stretches: tuple[Stretch, ...]) -> Documents:
        """One document per row, of the columns in these stretches."""
        rows = []
        for begin in self.starts or [0] * batch:
            row: list[Run] = []
            for start, length, column in stretches:
                padding = length if column < 0 else min(max(begin - column, 0), length)
                row += [Run(PADDING, start, padding, 0)] if padding else []
                if padding < length:
                    row.append(Run(0, start + padding, length - padding, column + padding - begin))
            rows.append(row)
        return Documents.of_runs(rows, sum(part.length for part in stretches))

    def kept(self, kept: Callable[[int], Intervals], column: int) -> Intervals:
        """The columns of all positions that are kept of rows which have come to a column."""
        intervals: Intervals = []
        for start in set(self.starts or [0]):
            if start < column:
                intervals += [(low + start, high + start) for low, high in kept(column - start)]
        return intervals

    def room(self, most_kept: Callable[[int, int], int]) -> int | None:
        """Rows of memory for what is kept and for one token more; None where `most` is not known.

        most_kept(columns, beginnings): at most so many are kept of that many columns, of rows that begin at so many.
        """
        if self.most is None:
            return None
        own = self.most
        if self.ranks > 1:
            turns = -(-(self.most - self.shared) // (TURN * self.ranks)) * TURN
            own = -(-self.shared // self.ranks) + min(self.most - self.shared, turns)
        return min(own, most_kept(self.most, len(set(self.starts or [0]))) + 1)


class CachedRows:
    """Rows `[B, n, …]` of the columns of a batch that later tokens can see.

    Several tensors, such as the keys and values of a layer, share the columns. Memory is made once where `append` is
    told for how many rows, and else grows. What is no longer kept is written over, so that rows stand in any order.
    Where several layers read the same rows, each says what it `needs`.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.loose: tuple[Tensor, ...] = ()  # what is kept and new rows beside it, more than memory has room for
        self.length = 0  # columns so far
        self.stretches: tuple[Stretch, ...] = ()  # those kept, in the order of memory
        self.needed: list[tuple[int, int]] = []  # by the layers that have read them since the last rows were appended

    @property
    def bytes(self) -> int:
        """Memory of the tensors, with the room for more rows."""
        return sum(x.numel() * x.element_size() for x in (*self.tensors, *self.loose))

    @property
    def kept(self) -> int:
        """How many columns are kept."""
        return sum(part.length for part in self.stretches)

    @property
    def capacity(self) -> int:
        """Rows that memory has room for."""
        return self.tensors[0].shape[1] if self.tensors else 0

    @torch.no_grad()
    def append(
        self,
        parts: tuple[Tensor, ...],
        room: int | None = None,
        columns: Iterable[tuple[int, int]] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Stretch, ...]]:
        """The tensors with the rows `parts` of new columns, as views, and what all rows are.

        room: for how many rows memory is made; by default it grows as it must. columns: (first, number) of those that
        the rows are of, by default the next ones. New rows for which there is no room stand beside the others until
        `keep` or `needs` says what is kept of them.
        """
        new = parts[0].shape[1]
        if self.needed or self.loose:
            self.keep(list(self.needed) or [(0, self.length)])
            self.needed = []
        if not self.tensors or (room is None and self.kept + new > self.capacity):
            self._make_room(parts, self.kept + new + (self.kept + new) // SPARE + 1 if room is None else room)
        columns = [(self.length, new)] if columns is None else list(columns)
        places = _gaps(self.stretches, self.capacity)
        if sum(length for _, length in places) < new:
            self.loose = tuple(
                torch.cat([*(x[:, at : at + n] for at, n, _ in self.stretches), part], dim=1)
                for x, part in zip(self.tensors, parts, strict=True)
            )
            self.stretches, places = _in_order(self.stretches), [(self.kept, new)]
        made, at = _placed(columns, places), 0
        for start, length, _ in made if not self.loose else ():
            for x, part in zip(self.tensors, parts, strict=True):
                x[:, start : start + length] = part[:, at : at + length]
            at += length
        self.stretches = _joined([*self.stretches, *made])
        self.length = max(self.length, *(first + number for first, number in columns), 0)
        return self.view()

    def view(self) -> tuple[tuple[Tensor, ...], tuple[Stretch, ...]]:
        """The tensors up to the last row that is kept, as views, and what their rows are."""
        rows, at = [], 0
        for part in self.stretches:
            rows += [Stretch(at, part.start - at, -1)] if part.start > at else []
            rows.append(part)
            at = part.start + part.length
        return tuple(x[:, :at] for x in self.loose or self.tensors), tuple(rows)

    @torch.no_grad()
    def fill(self, x: Tensor, places: list[tuple[int, int]], room: int | None = None) -> Tensor:
        """Writes the first rows of x `[B, n, …]` to places first..last of each row of the batch; all rows so far.

        places: of each row, or of all rows alike. For what rows have at different times, such as summaries.
        """
        most = max(last for _, last in places)
        if not self.tensors or most > self.capacity:
            self._make_room((x,), most + most // SPARE + 1 if room is None or most > room else room)
        for row, (first, last) in enumerate(places):
            of_batch = slice(row, row + 1) if len(places) > 1 else slice(None)
            self.tensors[0][of_batch, first:last] = x[of_batch, : last - first]
        self.stretches, self.length = (Stretch(0, most, 0),) if most else (), most
        return self.tensors[0][:, :most]

    def needs(self, intervals: Intervals) -> None:
        """Keeps these columns for one of several readers; the next `append` gives up what none of them needs."""
        self.needed += intervals

    @torch.no_grad()
    def keep(self, intervals: Intervals) -> None:
        """Gives up all columns outside these, which may overlap and come in any order."""
        kept, intervals = [], _disjoint(intervals)
        for start, length, column in self.stretches:
            for low, high in intervals:
                low, high = max(low, column), min(high, column + length)
                if low < high:
                    kept.append(Stretch(start + low - column, high - low, low))
        self.stretches = tuple(kept)
        if self.loose:
            if self.kept > self.capacity:
                self._make_room(self.loose, self.kept + self.kept // SPARE + 1)
            else:
                self._move(self.loose)

    def _make_room(self, like: tuple[Tensor, ...], room: int) -> None:
        """Moves what is kept to new memory for so many rows."""
        old = self.loose or self.tensors
        self.tensors = tuple(x.new_zeros(x.shape[0], room, *x.shape[2:]) for x in like)
        if old:
            self._move(old)

    def _move(self, old: tuple[Tensor, ...]) -> None:
        """Copies what is kept of the rows of other tensors to the front of memory."""
        moved = _in_order(self.stretches)
        for (start, length, _), (at, *_) in zip(moved, self.stretches, strict=True):
            for x, before in zip(self.tensors, old, strict=True):
                x[:, start : start + length] = before[:, at : at + length]
        self.stretches, self.loose = _joined(moved), ()


def _gaps(stretches: Iterable[Stretch], capacity: int) -> list[tuple[int, int]]:
    """The (first, number) of rows of memory that are in no stretch, in order."""
    gaps, at = [], 0
    for start, length, _ in (*stretches, Stretch(capacity, 0, -1)):
        gaps += [(at, start - at)] if start > at else []
        at = start + length
    return gaps


def _placed(columns: Iterable[tuple[int, int]], places: list[tuple[int, int]]) -> list[Stretch]:
    """The columns one after the other at the places, in order."""
    stretches, places = [], places[::-1]
    for column, number in columns:
        while number:
            start, room = places.pop()
            length = min(number, room)
            stretches.append(Stretch(start, length, column))
            column, number = column + length, number - length
            if room > length:
                places.append((start + length, room - length))
    return stretches


def _in_order(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same columns in memory from row 0 on, without gaps."""
    moved, at = [], 0
    for _, length, column in stretches:
        moved.append(Stretch(at, length, column))
        at += length
    return tuple(moved)


def _joined(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same stretches in the order of memory, those that continue each other as one."""
    joined: list[Stretch] = []
    for part in sorted(stretches):
        last = joined[-1] if joined else Stretch(-1, 0, -1)
        if (last.start + last.length, last.column + last.length) == (part.start, part.column):
            joined[-1] = last._replace(length=last.length + part.length)
        else:
            joined.append(part)
    return tuple(joined)


def _disjoint(intervals: Intervals) -> list[tuple[int, int]]:
    """The same numbers as intervals in order, none of which touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return joined


class DecodingCache:
    """What decoding keeps of the tokens so far, for each (layer, slot); owned by the caller.

    starts: of each row, how much padding it has before its first token.    most: how many tokens and padding each row
    will have in all: memory is made once for them. By default rows have no padding, and memory grows.
    rank, ranks, group: the ranks that share the rows, if several do: each keeps the keys and values of some tokens.

    states: tensors of a fixed size, which every call replaces.     rows: what grows with the tokens.
    published: rows that later layers read too, by the name under which the last layer before them gave them out; all
    parts share it. `length` counts the columns that every layer has seen; call `advance` after the whole model has run
    on new ones. Raises ValueError, in `advance` and before any op runs, for more columns than `most`.
    """

    def __init__(
        self,
        starts: Iterable[int] | None = None,
        most: int | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
        group: Group | None = None,
    ) -> None:
        self.columns = Columns(starts, most, rank, ranks, group)
        self.states: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], CachedRows] = {}
        self.published: dict[str, CachedRows] = {}
        self._parts: dict[str, DecodingCache] = {}

    @property
    def length(self) -> int:
        """Columns so far."""
        return self.columns.length

    def of(self, part: str) -> DecodingCache:
        """The cache of one part of a layer, which has slots of its own."""
        if part not in self._parts:
            self._parts[part] = DecodingCache()
        cache = self._parts[part]
        cache.columns, cache.published = self.columns, self.published
        return cache

    def rows_of(self, layer: int, slot: str) -> CachedRows:
        """The rows that a layer's slot keeps; none at first."""
        return self.rows.setdefault((layer, slot), CachedRows())

    def require(self, columns: int) -> None:
        """Raises ValueError unless there is room for so many more columns."""
        most = self.columns.most
        if most is not None and self.length + columns > most:
            raise ValueError(
                f"the cache must have room for all tokens; got {columns} after {self.length} with room for {most}. "
                "Raise most"
            )

    def advance(self, columns: int) -> None:
        """Counts new columns."""
        self.columns.length += columns

    def end(self, row: int) -> None:
        """Makes a row padding from now on: nothing is computed for it or kept of it, and its outputs say nothing."""
        columns = self.columns
        assert columns.starts is not None, "rows that can end have starts"
        columns.starts[row] = FAR

    @property
    def bytes(self) -> int:
        """Memory that the cached tensors take."""
        own = sum(x.numel() * x.element_size() for x in self.states.values())
        own += sum(rows.bytes for rows in self.rows.values())
        return own + sum(part.bytes for part in self._parts.values())
