"""Folding: queries laid out so that attention to windows is causal attention to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..derived import Deriving
from ..documents import PADDING, Documents, Run
from ..masks import Mask, Tile
from ..masks.strides import Order
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
        rows = []
        for row, first in enumerate(self.windows.first):
            runs, end = [], self.windows.counts[row]
            starts = [*first.items(), (PADDING, end)]
            for (document, start), (_, stop) in pairwise(starts):
                if stop > start:
                    runs.append(Run(document, start, stop - start, 0))
            if end < self.length:
                runs.append(Run(PADDING, end, self.length - end, 0))
            rows.append(tuple(runs))
        return Documents.of_runs(rows, self.length)

    @cached_property
    def places(self) -> tuple[Documents, Order]:
        """The documents of the places, and the queries in the order of `places · stride`."""
        lead, stride = self.windows.size - 1, self.windows.stride
        rows: list[list[Run]] = []
        for runs in self.documents.runs:
            places, used = [], 0
            for run in runs:
                begin = max(run.position, lead)
                if run.is_padding or begin >= run.end_position:
                    continue
                first, last = (begin - lead) // stride, (run.end_position - 1 - lead) // stride
                places.append(Run(run.document, used, last - first + 1, first))
                used += last - first + 1
            rows.append(places)
        most = max((places[-1].stop for places in rows if places), default=0)
        queries = torch.full((self.documents.batch, most * stride), self.documents.length)
        folded = torch.full((self.documents.batch, self.documents.length), most * stride)
        for row, (runs, places) in enumerate(zip(self.documents.runs, rows, strict=True)):
            seeing = [run for run in runs if not run.is_padding and run.end_position > lead]
            for run, place in zip(seeing, places, strict=True):
                begin = max(run.position, lead)
                at = (place.start - place.position) * stride + begin - lead
                number = run.end_position - begin
                tokens = torch.arange(number) + run.start + begin - run.position
                queries[row, at : at + number] = tokens
                folded[row, tokens] = torch.arange(at, at + number)
            if not places or places[-1].stop < most:
                end = places[-1].stop if places else 0
                places.append(Run(PADDING, end, most - end, 0))
        packed = tuple(tuple(run for run in places if run.length) for places in rows)
        return Documents.of_runs(packed, most), Order(queries, folded)

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
