"""Blocks: how the documents of whole rows are cut into numbered blocks, and where these lie among a set of keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .derived import Deriving
from .documents import Documents, Runs, expanded, per_token, ranks_in_groups
from .masks import Mask, Pattern

Number = TypeVar("Number", int, Tensor)


class Block(NamedTuple):
    """Consecutive tokens of one document: `length` from row index `start`, the first at `position` in the document."""

    document: int
    start: int
    length: int
    position: int


@dataclass(frozen=True)
class Numbered(Deriving, ABC):
    """Stretches of the documents of whole rows, numbered document by document, from 0 in each row.

    `documents` are those of the whole rows, so that a number means the same tokens on every rank. Raises ValueError for
    a document that does not begin in its row, since its stretches could not be numbered.
    """

    documents: Documents

    def __post_init__(self) -> None:
        # A copy that shares the table: rows keep what is derived from them, and in a cycle with it all would wait for
        # Python's collector of cycles.
        object.__setattr__(self, "documents", replace(self.documents))
        runs = self.documents.columns
        late = (runs.position > 0).nonzero()
        if len(late):
            _, _, start, _, position = self.documents.table[int(late[0])].tolist()
            raise ValueError(
                f"documents of whole rows must begin at position 0; got position {position} at token {start}. Pass "
                "the documents of the whole row, and a part of its tokens as a tile"
            )

    @abstractmethod
    def number(self, length: Number) -> Number:
        """How many stretches a document of `length` tokens has, or many documents."""

    @cached_property
    def stretches(self) -> tuple[Tensor, Tensor]:
        """int64 `[R]` each: for each run of the rows its number of stretches, 0 for padding, and its first's number."""
        runs = self.documents.columns
        each = torch.where(runs.real, self.number(runs.length), 0)
        before = each.cumsum(0) - each
        first_of_row = before[self.documents.ends[:, 0].clamp(max=max(len(each) - 1, 0))] if len(each) else before
        return each, before - first_of_row[runs.row]

    @cached_property
    def first(self) -> tuple[dict[int, int], ...]:
        """For each row, the number of every document's first stretch: for what goes through documents in Python."""
        rows: list[dict[int, int]] = [{} for _ in range(self.documents.batch)]
        runs, (_, first) = self.documents.columns, self.stretches
        lines = torch.stack([runs.row, runs.document, first], dim=1)[runs.real]
        for row, document, number in lines.tolist():
            rows[row][document] = number
        return tuple(rows)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many stretches each row has."""
        counts = torch.zeros(self.documents.batch, dtype=torch.int64, device="cpu")
        return tuple(counts.index_add_(0, self.documents.columns.row, self.stretches[0]).tolist())

    @cached_property
    def count(self) -> int:
        """The most stretches of any row: numbers are below it."""
        return max(self.counts, default=0)

    def first_of(self, runs: Runs) -> Tensor:
        """int64: the number of the first stretch of the document of each run; −1 for padding.

        Raises ValueError for a document that is not of the rows.
        """
        lines = self.documents.lines(runs)
        missing = (runs.real & (lines < 0)).nonzero()
        if len(missing):
            row, document = int(runs.row[missing[0]]), int(runs.document[missing[0]])
            raise ValueError(f"tokens must be of the rows' documents; row {row} has no document {document}")
        return torch.where(lines < 0, -1, self.stretches[1][lines])


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

    def number(self, length: Number) -> Number:
        return -(-length // self.block_size)

    def row(self, row: int) -> Iterator[Block]:
        """The blocks of one row in the order of their ids."""
        for run in self.documents.runs[row]:
            if not run.is_padding:
                for position in range(0, run.length, self.block_size):
                    length = min(self.block_size, run.length - position)
                    yield Block(run.document, run.start + position, length, position)

    def ids(self, tokens: Documents) -> Tensor:
        """int32 `[B, T]`: the block of each of `tokens`, any tokens of these rows; −1 for padding."""
        first = per_token(tokens, self.first_of(tokens.columns).int())
        ids = tokens.positions() // self.block_size + first
        return ids.masked_fill_(first < 0, -1)

    def pieces(self, tokens: Documents) -> Tensor:
        """int32 `[R, B, count, 4]`: where the blocks lie among `tokens`, as (start, length, position, document).

        A block that is spread over several spans has up to R pieces; pieces that it lacks have length 0.
        """
        runs, size = tokens.columns.at(tokens.columns.real), self.block_size
        begin, end = runs.position // size, (runs.end_position - 1) // size + 1
        owner, place = expanded(end - begin)
        block = begin[owner] + place
        number, runs = block + self.first_of(runs)[owner], runs.at(owner)
        low = torch.maximum(block * size, runs.position)
        high = torch.minimum((block + 1) * size, runs.end_position)
        layer = ranks_in_groups(runs.row * self.count + number)
        table = torch.zeros(int(layer.max()) + 1 if len(layer) else 1, tokens.batch, self.count, 4, dtype=torch.int32)
        piece = torch.stack([low + runs.start - runs.position, high - low, low, runs.document], dim=-1)
        table[layer, runs.row, number] = piece.int()
        return table


@dataclass(frozen=True)
class BlockTile(Deriving):
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
        return self.on(device, _pieces)

    def placed(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Documents and positions in one number, for kernels: int32 `[R, B, count, 5]` pieces and places `[B, T]`.

        A token's place is its index in the whole row, and padding has −1: each document has a range of places of its
        own. A piece is (start, length, position, first place of its document, the place after its last).
        """
        return self.on(device, _placed)


def _pieces(tile: BlockTile) -> Tensor:
    return tile.layout.pieces(tile.keys)


def _placed(tile: BlockTile) -> tuple[Tensor, Tensor]:
    table, rows = tile.derive(_pieces), tile.layout.documents
    batch = torch.arange(table.shape[1]).view(-1, 1).expand(table.shape[1:3])
    of_pieces = Runs(batch.flatten(), table[..., 3].long().amax(0).flatten(), *[torch.zeros(0)] * 3)
    lines = rows.lines(of_pieces).clamp(min=0).view(table.shape[1:3])
    bounds = torch.stack([rows.columns.start, rows.columns.stop], dim=-1)[lines]
    placed = torch.cat([table[..., :3], bounds.int().expand(len(table), -1, -1, -1)], dim=-1)
    queries = tile.queries.columns
    lines = rows.lines(queries)
    first = torch.where(lines < 0, 0, rows.columns.start[lines.clamp(min=0)]).int()
    places = tile.queries.positions() + per_token(tile.queries, first)
    return placed, places.masked_fill_(tile.queries.ids() < 0, -1)
