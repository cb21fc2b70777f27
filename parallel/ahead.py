"""Ahead: what belongs to the tokens that come after each token in its document."""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import Gathering, in_row_order
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


def _following(folded: Tensor, seq: Sequence, most: int, fill: int) -> Tensor:
    """`[spans * B, most, ...]`: the tokens of the row that follow each folded span; `fill` beyond its end."""
    layout, length = seq.layout, folded.shape[1]
    shape = folded.shape[0], most, *folded.shape[2:]
    if layout.ranks == 1 or folded.device.type == "meta":
        return folded.new_full(shape, fill)
    first = folded[:, : min(most, length)].unflatten(0, (layout.spans, -1))
    spans = in_row_order(Gathering(first, seq).wait(), seq)
    beyond = first.new_full((first.shape[1], most, *first.shape[3:]), fill)
    parts = [torch.cat([*spans[span + 1 :][:most], beyond], dim=1)[:, :most] for span in layout.spans_of(seq.rank)]
    return torch.cat(parts)
