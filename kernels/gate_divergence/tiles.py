"""Which complete blocks of a set of keys which queries see, and the keys of these blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..derived import Deriving
from ..documents import Documents, Runs, expanded
from ..masks.pattern import Pieces, joined
from ..windows import WindowLayout


@dataclass(frozen=True, eq=False)
class GateTile(Deriving):
    """Some queries against some complete blocks of keys, of one document each.

    pieces: runs of queries beside runs of blocks: a block's start is its place among the keys' blocks, and its position
        is its number in the document. first: the number of the document's first block in its row.
    """

    pieces: Pieces
    first: Tensor
    block_size: int

    @classmethod
    def of(cls, rows: Documents, queries: Documents, keys: Documents, size: int, cut: int) -> GateTile:
        """Of the blocks that end among `keys`: tokens of `rows`, in spans of `cut`."""
        pieces = joined(queries.columns, blocks_among(keys, size, cut))
        some = pieces.queries.end_position >= (pieces.keys.position + 1) * size
        pieces = Pieces(*(runs.at(some) for runs in pieces))
        return cls(pieces, rows.derive(WindowLayout, size, size).first_of(pieces.keys), size)


def blocks_among(keys: Documents, size: int, cut: int) -> Runs:
    """Runs of the complete blocks that end in each span of `cut` tokens: their places, number and numbers.

    A span has ceil(cut / size) places, of which the first are taken.
    """
    runs = keys.columns.at(keys.columns.real)
    first = runs.start // cut
    owner, place = expanded((runs.stop - 1) // cut - first + 1)
    span, runs = first[owner] + place, runs.at(owner)
    low, high = torch.maximum(runs.start, span * cut), torch.minimum(runs.stop, (span + 1) * cut)
    position = (runs.position + low - runs.start) // size
    number = (runs.position + high - runs.start) // size - position
    before = number.cumsum(0) - number
    spans = runs.row * -(-keys.length // cut) + span
    first_of_span = torch.searchsorted(spans, spans)
    start = span * -(-cut // size) + before - before[first_of_span]
    return Runs(runs.row, runs.document, start, number, position).at(number > 0)


def windows_of_rows(k: Tensor, documents: Documents, size: int) -> Tensor:
    """`[B, W, size, G, K]`: the keys of all complete blocks of whole rows `[B, N, G, K]`."""
    first = documents.derive(WindowLayout, size, size).on(k.device, _first_tokens)
    row = torch.arange(len(k), device=k.device).view(-1, 1, 1)
    return k[row, first.unsqueeze(2) + torch.arange(size, device=k.device)]


def _first_tokens(layout: WindowLayout) -> Tensor:
    return layout.table()[..., 2].long().clamp(min=0)
