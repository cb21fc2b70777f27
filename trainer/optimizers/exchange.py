"""Exchange: whole matrices on the ranks that compute with them, out of the parts that ZeRO has left each rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...parallel.collectives import all_gather, all_to_all_rows


class Part(NamedTuple):
    """`count` matrices `[rows, columns]` that follow one another in a parameter, and what this rank has of them.

    It has elements start .. start + length of the parameter, from `offset` on in flat tensor number `flat`.
    """

    flat: int
    count: int
    rows: int
    columns: int
    offset: int
    start: int
    length: int


class _Unit(NamedTuple):
    """Matrices of one part that go to one rank: elements first .. last of the parameter."""

    part: int
    first: int
    last: int
    owner: int


class _Piece(NamedTuple):
    """What a rank has of a unit: elements low .. high of the parameter."""

    unit: int
    low: int
    high: int


class Exchange:
    """Which matrices go to which rank, in how many pieces from whom.

    parts: the same on each of the `ranks` ranks of the group, but for offset, start and length. Every rank makes it and
    calls its methods, in the same order. On `meta` nothing travels: it gives the shapes that the first rank gets, where
    all hold equal parts.
    """

    def __init__(self, parts: list[Part], ranks: int, group: Any, device: torch.device) -> None:
        self._parts, self._ranks, self._group = parts, ranks, group
        self._units = assign(parts, ranks)
        alone = ranks == 1 or device.type == "meta"
        held = _equal(parts, ranks) if alone else _held(parts, ranks, group, device)
        rank = 0 if alone else torch.distributed.get_rank(group)
        self._mine = [number for number, unit in enumerate(self._units) if unit.owner == rank]
        self._sends = [
            _pieces([n for n, unit in enumerate(self._units) if unit.owner == owner], self._units, held[rank])
            for owner in range(ranks)
        ]
        self._receives = [_pieces(self._mine, self._units, theirs) for theirs in held]

    def gather(self, flats: list[Tensor]) -> list[Tensor]:
        """The matrices that go to this rank, `[n, rows, columns]` each, out of all ranks' flat tensors."""
        pieces = [piece for to_owner in self._sends for piece in to_owner]
        own = [self._of_flat(flats, piece) for piece in pieces]
        received = self._travel(torch.cat(own) if own else flats[0].new_empty(0), self._sends, self._receives)
        whole = {
            number: received.new_empty(self._units[number].last - self._units[number].first) for number in self._mine
        }
        for (number, low, high), values in self._split(received, self._receives):
            first = self._units[number].first
            whole[number][low - first : high - first] = values
        return [whole[number].view(-1, *self._parts[self._units[number].part][2:4]) for number in self._mine]

    def scatter(self, matrices: list[Tensor], like: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """What came of the matrices that `gather` gave, for this rank: each piece with the place where it begins.

        They are of the type and on the device of `like`.
        """
        whole = {number: matrix.reshape(-1) for number, matrix in zip(self._mine, matrices, strict=True)}
        pieces = [piece for to_rank in self._receives for piece in to_rank]
        own = [whole[n][low - self._units[n].first : high - self._units[n].first] for n, low, high in pieces]
        received = self._travel(torch.cat(own) if own else like.new_empty(0), self._receives, self._sends)
        for (number, low, _), values in self._split(received, self._sends):
            part = self._parts[self._units[number].part]
            yield part._replace(offset=part.offset + low - part.start), values

    def _of_flat(self, flats: list[Tensor], piece: _Piece) -> Tensor:
        part = self._parts[self._units[piece.unit].part]
        return flats[part.flat].narrow(0, part.offset + piece.low - part.start, piece.high - piece.low)

    def _travel(self, x: Tensor, sends: list[list[_Piece]], receives: list[list[_Piece]]) -> Tensor:
        if self._ranks == 1:
            return x
        sizes = ([sum(piece.high - piece.low for piece in pieces) for pieces in each] for each in (sends, receives))
        if x.device.type == "meta":
            return x.new_empty(sum([*sizes][1]))
        return all_to_all_rows(x, *sizes, group=self._group)

    @staticmethod
    def _split(x: Tensor, pieces: list[list[_Piece]]) -> Iterator[tuple[_Piece, Tensor]]:
        flat = [piece for each in pieces for piece in each]
        return zip(flat, x.split([piece.high - piece.low for piece in flat]), strict=True)


def _held(parts: list[Part], ranks: int, group: Any, device: torch.device) -> list[list[list[int]]]:
    """Of each rank, start and length of its share of each part."""
    own = torch.tensor([part[-2:] for part in parts], dtype=torch.int64, device=device).view(-1)
    every = own.new_empty(ranks, len(own))
    all_gather(every.view(-1), own, group=group)
    return every.view(ranks, -1, 2).tolist()


def _equal(parts: list[Part], ranks: int) -> list[list[list[int]]]:
    """The same where all ranks have equal shares, as long as the parts are."""
    sizes = [part.count * part.rows * part.columns for part in parts]
    lengths = [-(-size // ranks) for size in sizes]
    return [
        [[min(rank * n, size), min(n, max(0, size - rank * n))] for n, size in zip(lengths, sizes, strict=True)]
        for rank in range(ranks)
    ]


def assign(parts: list[Part], ranks: int) -> list[_Unit]:
    """The owners of all matrices, balanced by the work that they make; the same on every rank."""
    units: list[tuple[float, int, int, int]] = []
    for number, (_, count, rows, columns, *_) in enumerate(parts):
        share = -(-count // ranks)  # matrices of a stack that stay together
        for first in range(0, count, share):
            last = min(first + share, count)
            size = rows * columns
            units.append((-size * min(rows, columns) * (last - first), number, first * size, last * size))
    loads, made = [0.0] * ranks, []
    for cost, number, first, last in sorted(units):
        owner = loads.index(min(loads))
        loads[owner] -= cost
        made.append(_Unit(number, first, last, owner))
    return sorted(made)


def _pieces(numbers: list[int], units: list[_Unit], held: list[list[int]]) -> list[_Piece]:
    """What a rank that holds this of each part has of these units."""
    pieces = []
    for number in numbers:
        start, length = held[units[number].part]
        low, high = max(units[number].first, start), min(units[number].last, start + length)
        if low < high:
            pieces.append(_Piece(number, low, high))
    return pieces
