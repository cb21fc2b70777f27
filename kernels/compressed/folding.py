"""Folding: queries laid out so that attention to windows is causal attention to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..derived import Deriving
from ..documents import Documents, expanded
from ..masks import Mask, Tile
from ..masks.plain_bands import Order
from ..windows import WindowLayout


@dataclass(frozen=True)
class Folding(Deriving):
    """How queries become rows of attention over windows: `stride` queries that see the same windows in each place.

    windows: those of the whole rows. documents: of the queries, any part of the rows. length: summaries per row, with
    padding.
    """

    windows: WindowLayout
    documents: Documents
    length: int

    @property
    def tile(self) -> Tile | None:
        """The work of folded queries against windows; None where no query sees any."""
        return self.derive(_tile)

    @property
    def keys(self) -> Documents:
        """The windows as tokens, each document's from position 0 on."""
        runs, (each, first) = self.windows.documents.columns, self.windows.stretches
        table = torch.stack([runs.row, runs.document, first, each, 0 * each], dim=1)[each > 0]
        return Documents.padded(table, self.documents.batch, self.length)

    @cached_property
    def places(self) -> tuple[Documents, Order]:
        """The documents of the places, and the queries in the order of `places · stride`."""
        lead, stride, length = self.windows.size - 1, self.windows.stride, self.documents.length
        runs = self.documents.columns
        runs = runs.at(runs.real & (runs.end_position > lead))
        begin = runs.position.clamp(min=lead)  # the first token that sees a window
        first = (begin - lead) // stride
        each = (runs.end_position - 1 - lead) // stride - first + 1
        used = torch.zeros(self.documents.batch, dtype=torch.int64).index_add_(0, runs.row, each)
        before = each.cumsum(0) - each - (used.cumsum(0) - used)[runs.row]
        most = int(used.max()) if len(used) else 0
        documents = Documents.padded(
            torch.stack([runs.row, runs.document, before, each, first], dim=1), self.documents.batch, most
        )
        queries = torch.full((self.documents.batch, most * stride), length)
        folded = torch.full((self.documents.batch, length), most * stride)
        number = runs.end_position - begin
        owner, offset = expanded(number)
        token = (runs.start + begin - runs.position)[owner] + offset
        place = ((before - first) * stride + begin - lead)[owner] + offset
        queries[runs.row[owner], place] = token
        folded[runs.row[owner], token] = place
        return documents, Order(queries, folded)

    def fold(self, x: Tensor, groups: int) -> Tensor:
        """`[B, T, H, D]` to `[B, places, groups · stride · H / groups, D]`: of a group, one query after the other."""
        rows = self._order(x.device).take(x)
        rows = rows.unflatten(1, (-1, self.windows.stride)).unflatten(3, (groups, -1))
        return rows.transpose(2, 3).flatten(2, 4)

    def unfold(self, x: Tensor, groups: int, fill: float) -> Tensor:
        """The inverse, with `fill` for queries that see no window; `[B, places, heads, …]` to `[B, T, H, …]`."""
        x = x.unflatten(2, (groups, self.windows.stride, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self._order(x.device).back(x, fill)

    def _order(self, device: torch.device) -> Order:
        return self.on(device, _order)


def _tile(folding: Folding) -> Tile | None:
    return Mask().tile(folding.places[0], folding.keys)


def _order(folding: Folding) -> Order:
    return folding.places[1]
