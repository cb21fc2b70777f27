"""Ahead: what belongs to the tokens that come after each token in its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.operation import Tensors
from .collectives import Gathering, in_row_order
from .operation import Exchange, present, tell
from .sequence import Sequence


def ahead(x: Tensor, seq: Sequence, most: int, fill: int) -> list[Tensor]:
    """For n = 1 .. `most`, the value of the token n places after each token; `fill` where the document has none there.

    x `[B, T, ...]` holds integers of this rank's tokens; the results are like it. Nothing is known beyond the end of
    the row. Every rank calls it: one all-gather of the first min(most, span length) tokens of each span.
    """
    folded = seq.fold(x)
    length = folded.shape[1]
    rows = torch.cat([folded, _following(folded, seq, most, fill)], dim=1)
    left = seq.tokens_after(x.device).view(*x.shape[:2], *[1] * (x.dim() - 2))
    shifted = [seq.unfold(rows[:, n : n + length]) for n in range(1, most + 1)]
    return [torch.where(left >= n, value, fill) for n, value in enumerate(shifted, 1)]


@dataclass(frozen=True)
class FirstTokens(Exchange):
    """What each rank has of the first `most` tokens of its folded spans, on every rank: `[P, spans, B, n, ...]`."""

    where: ClassVar[str] = "multi-token prediction"
    what: ClassVar[str] = "first tokens of spans"
    most: int

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        (folded,) = present(*inputs)
        first = folded[:, : self.most].unflatten(0, (seq.layout.spans, -1))
        return (Gathering(first, seq).wait(),), ()


def _following(folded: Tensor, seq: Sequence, most: int, fill: int) -> Tensor:
    """`[spans * B, most, ...]`: the tokens of the row that follow each folded span; `fill` beyond its end."""
    layout, length = seq.layout, folded.shape[1]
    shape = folded.shape[0], most, *folded.shape[2:]
    if layout.ranks == 1:
        return folded.new_full(shape, fill)
    first = FirstTokens(min(most, length))
    if folded.device.type == "meta":
        tell("forward", first, (folded,), seq)
        return folded.new_full(shape, fill)
    (gathered,) = present(*first.forward((folded,), seq)[0])
    spans = in_row_order(gathered, seq)
    beyond = folded.new_full((folded.shape[0] // layout.spans, most, *folded.shape[2:]), fill)
    parts = [torch.cat([*spans[span + 1 :][:most], beyond], dim=1)[:, :most] for span in layout.spans_of(seq.rank)]
    return torch.cat(parts)
