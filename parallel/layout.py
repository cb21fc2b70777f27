"""Layout: which spans of a row each sequence rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.documents import Documents


@dataclass(frozen=True)
class Layout:
    """A row of `length` tokens cut into `ranks * spans` equal spans, dealt to the ranks back and forth.

    Rank r holds span r of the first `ranks` spans, span 2P−1−r of the whole (the second turn comes back), and so on:
    one span per rank is the contiguous layout, two the zigzag that balances one causal document, more balance packed
    documents too. A rank keeps its spans in the order of the row. Raises ValueError where the row does not divide
    evenly.
    """

    length: int
    ranks: int = 1
    spans: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.spans < 1:
            raise ValueError(f"ranks and spans must be at least 1; got {self.ranks} and {self.spans}")
        if self.length % (self.ranks * self.spans):
            raise ValueError(
                f"the sequence length must be a multiple of sequence ranks * spans = {self.ranks} * {self.spans}; "
                f"got {self.length}. Change data.sequence_length, parallel.sequence or parallel.spans"
            )

    @property
    def span_length(self) -> int:
        return self.length // (self.ranks * self.spans)

    @property
    def local_length(self) -> int:
        return self.span_length * self.spans

    def spans_of(self, rank: int) -> tuple[int, ...]:
        """Indices of the spans of `rank`, in the order of the row."""
        return tuple(
            turn * self.ranks + (rank if turn % 2 == 0 else self.ranks - 1 - rank) for turn in range(self.spans)
        )

    @property
    def last_rank(self) -> int:
        """The rank that holds the last span of the row."""
        return self.ranks - 1 if self.spans % 2 else 0

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """`[B, N, …]` to the `[B, T, …]` of `rank`."""
        if self.ranks == 1:
            return x
        n = self.span_length
        return torch.cat([x[:, s * n : (s + 1) * n] for s in self.spans_of(rank)], dim=1)

    def unshard(self, parts: list[Tensor]) -> Tensor:
        """The `[B, T, …]` of every rank, in rank order, to `[B, N, …]`."""
        pieces = {}
        for rank, part in enumerate(parts):
            pieces.update(zip(self.spans_of(rank), part.split(self.span_length, dim=1), strict=True))
        return torch.cat([pieces[s] for s in range(self.ranks * self.spans)], dim=1)

    def span_documents(self, documents: Documents, rank: int) -> Documents:
        """The documents of the spans of `rank`, cut from whole rows: `[spans * B, span_length]`, span after span."""
        if self.ranks * self.spans == 1:
            return documents
        cut, batch = documents.derive(Documents.spans, self.span_length), documents.batch
        return Documents.stack([cut.rows(s * batch, (s + 1) * batch) for s in self.spans_of(rank)])

    def documents(self, documents: Documents, rank: int) -> Documents:
        """The documents of the `[B, T]` tokens that `rank` holds, span after span."""
        if self.ranks == 1:
            return documents
        return self.parts(documents).rows(rank * documents.batch, (rank + 1) * documents.batch)

    def parts(self, documents: Documents) -> Documents:
        """The documents of the tokens that each rank holds, `[P * B, T]`, rank after rank."""
        return documents if self.ranks == 1 else documents.derive(_parts, self)


def _parts(documents: Documents, layout: Layout) -> Documents:
    held = torch.tensor([layout.spans_of(rank) for rank in range(layout.ranks)])  # [P, spans]
    rank, turn = (torch.empty(held.numel(), dtype=torch.int64) for _ in range(2))
    rank[held] = torch.arange(layout.ranks).unsqueeze(1).expand_as(held)
    turn[held] = torch.arange(layout.spans).expand_as(held)
    row, document, start, length, position = documents.derive(Documents.spans, layout.span_length).columns
    span, row = row // documents.batch, row % documents.batch
    dealt = [rank[span] * documents.batch + row, document, turn[span] * layout.span_length + start, length, position]
    return Documents.joined(torch.stack(dealt, dim=1), layout.ranks * documents.batch, layout.local_length)
