"""Blocks: how the documents of whole rows are cut into numbered blocks, and where these lie among a set of keys."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .documents import Documents, Run
from .masks import Mask, Pattern


class Block(NamedTuple):
    """Consecutive tokens of one document: `length` from row index `start`, the first at `position` in the document."""

    document: int
    start: int
    length: int
    position: int


@dataclass(frozen=True)
class Numbered(ABC):
    """Stretches of the documents of whole rows, numbered document by document, from 0 in each row.

    `documents` are those of the whole rows, so that a number means the same tokens on every rank. Raises ValueError for
    a document that does not begin in its row, since its stretches could not be numbered.
    """

    documents: Documents

    def __post_init__(self) -> None:
        for row in self.documents.runs:
            for run in row:
                if run.position:
                    raise ValueError(
                        f"documents of whole rows must begin at position 0; got position {run.position} at token "
                        f"{run.start}. Pass the documents of the whole row, and a part of its tokens as a tile"
                    )

    @abstractmethod
    def number(self, length: int) -> int:
        """How many stretches a document of `length` tokens has."""

    @cached_property
    def first(self) -> tuple[dict[int, int], ...]:
        """For each row, the number of every document's first stretch."""
        rows = []
        for row in self.documents.runs:
            first, count = {}, 0
            for run in row:
                if not run.is_padding:
                    first[run.document] = count
                    count += self.number(run.length)
            rows.append(first)
        return tuple(rows)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many stretches each row has."""
        return tuple(sum(self.number(run.length) for run in row if not run.is_padding) for row in self.documents.runs)

    @property
    def count(self) -> int:
        """The most stretches of any row: numbers are below it."""
        return max(self.counts, default=0)


@dataclass(frozen=True)
class BlockLayout(Numbered):
    """The blocks of whole rows: `block_size` tokens each, restarting at every document.

    A document's last block may be shorter. The ids of blocks are their numbers; padding is in no block.
    """

    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}")
        super().__post_init__()

    def number(self, length: int) -> int:
        return -(-length // self.block_size)

    def row(self, row: int) -> Iterator[Block]:
        """The blocks of one row in the order of their ids."""
        for run in self.documents.runs[row]:
            if not run.is_padding:
                for position in range(0, run.length, self.block_size):
                    length = min(self.block_size, run.length - position)
                    yield Block(run.document, run.start + position, length, position)

    def ids(self, tokens: Documents, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: the block of each of `tokens`, any tokens of these rows; −1 for padding."""
        ids = torch.full((tokens.batch, tokens.length), -1, dtype=torch.int32)
        for row, runs in enumerate(tokens.runs):
            for run in runs:
                if not run.is_padding:
                    positions = torch.arange(run.position, run.end_position, dtype=torch.int32)
                    ids[row, run.start : run.stop] = positions // self.block_size + self._first(row, run)
        return ids.to(device)

    def pieces(self, tokens: Documents) -> Tensor:
        """int32 `[R, B, count, 4]`: where the blocks lie among `tokens`, as (start, length, position, document).

        A block that is spread over several spans has up to R pieces; pieces that it lacks have length 0.
        """
        table = torch.zeros(1, tokens.batch, self.count, 4, dtype=torch.int32)
        taken = torch.zeros(tokens.batch, self.count, dtype=torch.int64)
        for row, runs in enumerate(tokens.runs):
            for run in runs:
                if run.is_padding:
                    continue
                first, size = self._first(row, run), self.block_size
                blocks = torch.arange(run.position // size, (run.end_position - 1) // size + 1)
                low = (blocks * size).clamp(min=run.position)
                high = ((blocks + 1) * size).clamp(max=run.end_position)
                piece = torch.stack((low + run.start - run.position, high - low, low, low * 0 + run.document), dim=-1)
                layer = taken[row, blocks + first]
                if int(layer.max()) == table.shape[0]:
                    table = torch.cat([table, torch.zeros_like(table[:1])])
                table[layer, row, blocks + first] = piece.int()
                taken[row, blocks + first] += 1
        return table

    def _first(self, row: int, run: Run) -> int:
        first = self.first[row].get(run.document)
        if first is None:
            raise ValueError(f"tokens must be of the rows' documents; row {row} has no document {run.document}")
        return first


@dataclass(frozen=True)
class BlockTile:
    """Queries against keys, through lists of the rows' blocks: what `attend` works on.

    layout: the blocks of the whole rows, by which the lists are numbered.
    queries, keys: any tokens of those rows; a query attends to the tokens of a listed block that are among `keys`.
    mask: compares positions inside the listed blocks.
    query_block: how many consecutive queries share a list.
    """

    layout: BlockLayout
    queries: Documents
    keys: Documents
    mask: Pattern = field(default_factory=Mask)
    query_block: int = 1
    _tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.query_block < 1:
            raise ValueError(f"query_block must be at least 1; got {self.query_block}")

    @classmethod
    def of(
        cls,
        layout: BlockLayout,
        queries: Documents,
        keys: Documents,
        *,
        mask: Pattern | None = None,
        query_block: int = 1,
    ) -> BlockTile | None:
        """The tile, or None where the mask hides every key from every query, whatever is listed."""
        mask = Mask() if mask is None else mask
        return cls(layout, queries, keys, mask, query_block) if mask.reaches(queries, keys) else None

    @property
    def lists(self) -> int:
        """How many lists the queries of a row have, per head with lists."""
        return -(-self.queries.length // self.query_block)

    def pieces(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[R, B, count, 4]`: see `BlockLayout.pieces`."""
        for key in (("pieces", "cpu"), ("pieces", str(device))):
            if key not in self._tensors:
                host = self._tensors.get(("pieces", "cpu"))
                self._tensors[key] = self.layout.pieces(self.keys) if host is None else host.to(device)
        return self._tensors["pieces", str(device)]

    def placed(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Documents and positions in one number, for kernels: int32 `[R, B, count, 5]` pieces and places `[B, T]`.

        Each document of a row gets its own range of places, and each token the place at its position in that range;
        padding has −1. A piece is (start, length, position, first place of its document, the place after its last).
        """
        key = "places", str(device)
        if key not in self._tensors:
            table = self.pieces()
            bounds = torch.zeros(*table.shape[:3], 2, dtype=torch.int32)
            places = torch.full((self.queries.batch, self.queries.length), -1, dtype=torch.int32)
            for row, runs in enumerate(self.queries.runs):
                ends = {run.document: run.length for run in self.layout.documents.runs[row] if not run.is_padding}
                for run in runs:
                    if not run.is_padding:
                        ends[run.document] = max(ends.get(run.document, 0), run.end_position)
                if not ends:
                    continue
                stops = dict(zip(sorted(ends), itertools.accumulate(ends[x] for x in sorted(ends)), strict=True))
                for run in runs:
                    if not run.is_padding:
                        first = stops[run.document] - ends[run.document] + run.position
                        places[row, run.start : run.stop] = torch.arange(first, first + run.length, dtype=torch.int32)
                names, after = torch.tensor(list(stops)), torch.tensor(list(stops.values()))
                at = torch.searchsorted(names, table[:, row, :, 3].long()).clamp(max=len(names) - 1)
                bounds[:, row, :, 1] = after[at].int()
                bounds[:, row, :, 0] = torch.nn.functional.pad(after[:-1], (1, 0))[at].int()
            self._tensors[key] = places.to(device)
            self._tensors["placed", str(device)] = torch.cat([table[..., :3], bounds], dim=-1).to(device)
        return self._tensors["placed", str(device)], self._tensors[key]
