"""Mask: which keys a query may see, and how a block of queries against a block of keys falls into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .documents import Documents, Run


class Piece(NamedTuple):
    """Queries and keys of one document in one row: index ranges in the held tokens, and their positions."""

    row: int
    query: Run
    key: Run


@dataclass(frozen=True)
class Mask:
    """A static predicate over (document, position) of a query i and a key j; never over indices.

    Visible are keys of the query's own document with, if `causal`, j <= i; with a `window`, 0 <= i − j < window
    (the query itself counts: W keys in all); and, whatever the window, positions j < `sink_tokens`
    (StreamingLLM, Xiao et al., 2023, arXiv 2309.17453). Padding (document −1) sees nothing and is seen by nothing.
    """

    causal: bool = True
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the query itself counts); got {self.window}")
        if self.window is not None and not self.causal:
            raise ValueError("window must come with causal=True; a two-sided window is not defined here")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must not be negative; got {self.sink_tokens}")
        if self.sink_tokens and self.window is None:
            raise ValueError("sink_tokens must come with a window; without one every earlier token is visible anyway")

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """bool `[..., Tq, Tk]` for positions `[..., Tq]` and `[..., Tk]` of one document."""
        i, j = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        seen = j <= i if self.causal else torch.ones_like(j <= i)
        if self.window is not None:
            seen = seen & ((i - j < self.window) | (j < self.sink_tokens))
        return seen

    def dense(self, queries: Documents, keys: Documents, device: torch.device | str = "cpu") -> Tensor:
        """bool `[B, Tq, Tk]`: the whole predicate, for references and tests."""
        q_ids, k_ids = queries.ids(device), keys.ids(device)
        same = (q_ids.unsqueeze(-1) == k_ids.unsqueeze(-2)) & (q_ids >= 0).unsqueeze(-1)
        return same & self.visible(queries.positions(device), keys.positions(device))

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        """The work of `queries` against `keys`; None where the mask leaves nothing, so that nothing is sent or run."""
        pieces = tuple(self._pieces(queries, keys))
        return Tile(self, pieces, queries, keys) if pieces else None

    def reaches(self, queries: Documents, keys: Documents) -> bool:
        """Whether any query sees any key: what `tile` finds, without listing it."""
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

    def pairs(self, query: Run, key: Run) -> int:
        """How many (query, key) pairs of two runs of one document are visible, in closed form."""
        if not self.causal:
            return query.length * key.length
        reached = _pairs_at_or_below(query, key.position, key.end_position)
        if self.window is None:
            return reached
        sink_end = min(max(self.sink_tokens, key.position), key.end_position)
        sinks = _pairs_at_or_below(query, key.position, sink_end)
        # Keys behind the sinks: those reached, less those that lie `window` or more behind the query.
        late = query._replace(position=query.position - self.window)
        behind = _pairs_at_or_below(late, sink_end, key.end_position)
        return sinks + (reached - sinks) - behind


def _pairs_at_or_below(query: Run, low: int, high: int) -> int:
    """Σ over query positions i of the number of key positions j in low..high with j <= i."""
    if high <= low:
        return 0
    first, last = query.position, query.end_position  # positions first..last−1
    total = max(0, last - max(first, high)) * (high - low)  # queries at or beyond `high` see all
    rise_low, rise_high = max(first, low), min(last, high)  # in between a query at i sees i − low + 1
    if rise_high > rise_low:
        count = rise_high - rise_low
        total += count * (rise_low - low + 1 + rise_high - low) // 2
    return total


@dataclass(frozen=True)
class Tile:
    """Non-empty work of held queries against held keys, cut into pieces of one document each.

    `derived` is for backends that keep what they work out from a tile, such as lists of blocks on a device.
    """

    mask: Mask
    pieces: tuple[Piece, ...]
    queries: Documents
    keys: Documents
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs: what attention costs, whatever the packing."""
        return sum(self.mask.pairs(piece.query, piece.key) for piece in self.pieces)

    @property
    def is_square_causal(self) -> bool:
        """Whether the tile is plain causal self-attention of whole rows, which library kernels take as it is."""
        return (
            self.mask == Mask()
            and self.queries.runs == self.keys.runs
            and self.queries.is_whole
            and len(self.pieces) == self.queries.batch
        )
