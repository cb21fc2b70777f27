"""Gathered attention: the keys and values of all ranks come together on each.

One gather forward and one backward, and one attention over the whole row: the fewest messages, any mask, and memory for
the keys and values of whole rows, which grouped heads keep small (Llama 3 trains so, arXiv 2407.21783).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.mask import Tile
from ...kernels.softmax import attend, attend_backward
from ..collectives import Gathering, in_row_order, scatter_sum
from ..sequence import Sequence
from .attention import Block, SharedAttention


class GatherAttention(SharedAttention):
    """Attention of the queries held here over the gathered keys and values of the row.

    Backward gathers them again rather than keeping them, and exchanges the gradients all to all; each owner adds them
    in the order of the ranks.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor] | None:
        k, v = _gather(k, v, seq)
        tile = self._tile(seq)
        return None if tile is None else attend(q, k, v, tile=tile, scale=self.scale, backend=seq.backend)

    def attend_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seq: Sequence
    ) -> tuple[Tensor, Tensor, Tensor]:
        every_k, every_v = _gather(k, v, seq)
        tile = self._tile(seq)
        if tile is None:
            dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, every_k, every_v))
        else:
            dq, dk, dv = attend_backward(
                dout, q, every_k, every_v, out, lse, tile=tile, scale=self.scale, backend=seq.backend
            )
        if seq.layout.ranks == 1:
            return dq, dk, dv
        parts = [Block.pack(seq.layout.shard(dk, rank), seq.layout.shard(dv, rank)) for rank in range(seq.layout.ranks)]
        total = scatter_sum(torch.stack([part.flat for part in parts]), seq)
        return dq, *Block(total, *parts[0].shapes).unpack()

    def _tile(self, seq: Sequence) -> Tile | None:
        return seq.derive(("gather", self.mask), lambda: self.mask.tile(seq.local, seq.documents))


def _gather(k: Tensor, v: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole rows, `[B, N, …]`."""
    if seq.layout.ranks == 1:
        return k, v
    spans, heads = seq.layout.spans, k.shape[2]
    flat = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)  # [B, T, G * (K + V)], one message
    mine = torch.stack(flat.chunk(spans, dim=1))
    row = torch.cat(in_row_order(Gathering(mine, seq).wait(), seq), dim=1)
    split = heads * k.shape[3]
    return row[..., :split].unflatten(2, (heads, -1)), row[..., split:].unflatten(2, (heads, -1))
