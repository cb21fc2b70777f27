"""DecodingCache: what decoding keeps of the tokens so far, in memory that has room for the next ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.masks.pattern import Intervals

SPARE = 2  # memory has room for 1 / SPARE more rows than it needs, so that a row is copied about SPARE times in all


class Stretch(NamedTuple):
    """Consecutive rows of a cache: `length` from row `start`, the first at `position`; −1 for rows no longer kept."""

    start: int
    length: int
    position: int


class CachedRows:
    """Rows `[B, n, …]` of the positions of one document that later tokens can see: appended to, without copying all.

    Several tensors, such as the keys and values of a layer, share the positions. Rows that are no longer kept stay
    where they are until the memory is full. Where several layers read the same rows, each says what it `needs`.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.used = 0  # rows of the tensors
        self.length = 0  # positions so far
        self.stretches: tuple[Stretch, ...] = ()  # those kept, in order
        self.needed: list[tuple[int, int]] = []  # by the layers that have read them since the last rows were appended

    @property
    def bytes(self) -> int:
        """Memory of the tensors, with the room for more rows."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    @property
    def kept(self) -> int:
        """How many positions are kept."""
        return sum(part.length for part in self.stretches)

    @torch.no_grad()
    def append(self, parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Stretch, ...]]:
        """The tensors with the rows `parts` of the next positions at their end, as views, and what all rows are."""
        if self.needed:
            self.keep(list(self.needed))
            self.needed = []
        new = parts[0].shape[1]
        if not self.tensors or self.used + new > self.tensors[0].shape[1]:
            self._make_room(parts)
        for x, part in zip(self.tensors, parts, strict=True):
            x[:, self.used : self.used + new] = part
        last = self.stretches[-1] if self.stretches else Stretch(self.used, 0, self.length)
        if last.start + last.length == self.used and last.position + last.length == self.length:
            self.stretches = (*self.stretches[:-1], last._replace(length=last.length + new))
        else:
            self.stretches = (*self.stretches, Stretch(self.used, new, self.length))
        self.used += new
        self.length += new
        return self.view()

    def view(self) -> tuple[tuple[Tensor, ...], tuple[Stretch, ...]]:
        """The tensors from the first row that is kept on, as views, and what their rows are."""
        begin = self.stretches[0].start
        rows, at = [], 0
        for part in self.stretches:
            start = part.start - begin
            rows += [Stretch(at, start - at, -1)] if start > at else []
            rows.append(part._replace(start=start))
            at = start + part.length
        return tuple(x[:, begin : self.used] for x in self.tensors), tuple(rows)

    def needs(self, intervals: Intervals) -> None:
        """Keeps these positions for one of several readers; the next `append` gives up what none of them needs."""
        self.needed += intervals

    def keep(self, intervals: Intervals) -> None:
        """Gives up all positions outside these, which may overlap and come in any order."""
        kept, intervals = [], _disjoint(intervals)
        for start, length, position in self.stretches:
            for low, high in intervals:
                low, high = max(low, position), min(high, position + length)
                if low < high:
                    kept.append(Stretch(start + low - position, high - low, low))
        self.stretches = tuple(kept)

    def _make_room(self, parts: tuple[Tensor, ...]) -> None:
        """Moves what is kept to the front of new tensors, with room for these parts and more."""
        needed = self.kept + parts[0].shape[1]
        old = self.tensors or tuple(x[:, :0] for x in parts)
        self.tensors = tuple(x.new_zeros(x.shape[0], needed + needed // SPARE + 1, *x.shape[2:]) for x in parts)
        self.used, moved = 0, []
        for start, length, position in self.stretches:
            for x, before in zip(self.tensors, old, strict=True):
                x[:, self.used : self.used + length] = before[:, start : start + length]
            moved.append(Stretch(self.used, length, position))
            self.used += length
        self.stretches = tuple(moved)


def _disjoint(intervals: Intervals) -> list[tuple[int, int]]:
    """The same positions as intervals in order, none of which touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return joined


class DecodingCache:
    """What decoding keeps of the tokens so far, for each (layer, slot); owned by the caller.

    states: tensors of a fixed size, which every call replaces.     rows: what grows with the tokens.
    published: rows that later layers read too, by the name under which the last layer before them gave them out; all
    parts share it. `length` counts the tokens that every layer has seen; call `advance` after the whole model has run
    on new ones.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], CachedRows] = {}
        self.published: dict[str, CachedRows] = {}
        self._parts: dict[str, DecodingCache] = {}

    def of(self, part: str) -> DecodingCache:
        """The cache of one part of a layer, which has slots of its own."""
        cache = self._parts.setdefault(part, DecodingCache())
        cache.length, cache.published = self.length, self.published
        return cache

    def rows_of(self, layer: int, slot: str) -> CachedRows:
        """The rows that a layer's slot keeps; none at first."""
        return self.rows.setdefault((layer, slot), CachedRows())

    def advance(self, tokens: int) -> None:
        self.length += tokens

    @property
    def bytes(self) -> int:
        """Memory that the cached tensors take."""
        own = sum(x.numel() * x.element_size() for x in self.states.values())
        own += sum(rows.bytes for rows in self.rows.values())
        return own + sum(part.bytes for part in self._parts.values())
