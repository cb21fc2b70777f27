"""Gathered attention: every rank gathers the keys and values of all.

One gather forward and one backward, and one attention over the whole row: the fewest messages, any mask, and memory for
the keys and values of whole rows, which grouped heads keep small (Llama 3 trains so, arXiv 2407.21783).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.attend import Attend, Gradient
from ..collectives import Gathering, Packed, in_row_order, scatter_sum
from ..sequence import Sequence
from .attention import SharedAttention, tile_of_row


class GatherAttention(SharedAttention):
    """Attention of a rank's queries over the gathered keys of the row.

    Backward gathers them again rather than keeping them, and exchanges the gradients all to all; each owner adds them
    in the order of the ranks.
    """

    def over_keys(self, inputs: Any, where: Sequence) -> tuple[Tensor, Tensor] | None:
        seq = self.rows(where)
        keys, tile = _gather(self.op.sent(inputs), seq), self._tile(seq)
        return None if tile is None else self.op.attend(inputs, keys, tile, seq.backend)

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Sequence
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        seq = self.rows(where)
        keys, tile = _gather(self.op.sent(inputs), seq), self._tile(seq)
        if tile is None:
            stay, gradients = {}, tuple(torch.zeros_like(x, dtype=gradient.exact) for x in keys)
        else:
            stay, gradients = self.op.attend_backward(gradient, inputs, keys, tile, seq.backend)
        if seq.layout.ranks == 1:
            return stay, gradients
        if self.op.constant:
            return stay, tuple(torch.zeros_like(x, dtype=gradient.exact) for x in self.op.sent(inputs))
        parts = [Packed.of(tuple(seq.layout.shard(x, rank) for x in gradients)) for rank in range(seq.layout.ranks)]
        total = Packed.like(parts[0].tensors)
        for number, flat in enumerate(total.flats):
            flat.copy_(scatter_sum(torch.stack([part.flats[number] for part in parts]), seq))
        return stay, total.tensors

    def _tile(self, seq: Sequence) -> Any:
        return seq.derive(tile_of_row, self.op)


def _gather(own: tuple[Tensor, ...], seq: Sequence) -> tuple[Tensor, ...]:
    """The inputs that travel, for whole rows `[B, N, …]`; tensors of one type share a message."""
    if seq.layout.ranks == 1:
        return own
    whole: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in own):
        places = [place for place, x in enumerate(own) if x.dtype == dtype]
        flat = torch.cat([own[place].flatten(2) for place in places], dim=-1)  # [B, T, …]
        mine = torch.stack(flat.chunk(seq.layout.spans, dim=1))
        row = torch.cat(in_row_order(Gathering(mine, seq).wait(), seq), dim=1)
        widths = [own[place].shape[2:].numel() for place in places]
        for place, x in zip(places, row.split(widths, dim=-1), strict=True):
            whole[place] = x.unflatten(-1, own[place].shape[2:])
    return tuple(whole[place] for place in range(len(own)))


def gather(until: int | None, build: Callable[..., Attend], *settings: Any) -> GatherAttention:
    """The op `build(*settings)` by a gather; plain values, as `mix` wants them."""
    return GatherAttention(build(*settings), until)
