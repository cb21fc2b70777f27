"""Compressed attention across ranks: every rank has the summaries of all windows, so that nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.compressed import Folding, attend, attend_backward, check_inputs
from ..kernels.select_blocks import WindowLayout
from .operation import Tensors, present
from .sequence import Sequence


@dataclass(frozen=True)
class CompressedAttention:
    """Attention of the queries held here to the windows of the whole row that lie in their past.

    An `Operation`; its inputs are (q, k, v), those summaries as `gather_windows` and `window_means` give them. The
    result is float32 (float64), `[B, T, H, V + 1]`: outputs, then the log-sum-exp, which carries no gradient.
    """

    size: int
    stride: int
    scale: float

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensors]:
        q, k, v = present(*inputs)
        folding = self._folding(seq, k.shape[1])
        check_inputs(q, k, v, folding.windows, folding.documents)
        out, lse = attend(q, k, v, folding=folding, scale=self.scale, backend=seq.backend)
        return torch.cat([out, lse.unsqueeze(-1)], dim=-1), ()

    def backward(self, dout: Tensor, inputs: Tensors, out: Tensor, saved: Tensors, seq: Sequence) -> Tensors:
        q, k, v = present(*inputs)
        dq, dk, dv = attend_backward(
            dout[..., :-1], q, k, v, out[..., :-1], out[..., -1], folding=self._folding(seq, k.shape[1]),
            scale=self.scale, backend=seq.backend,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[Tensor, Tensors]:
        q, _, v = present(*inputs)
        return q.new_empty((*q.shape[:-1], v.shape[-1] + 1), dtype=torch.promote_types(q.dtype, torch.float32)), ()

    def _folding(self, seq: Sequence, length: int) -> Folding:
        def make() -> Folding:
            return Folding(WindowLayout(seq.documents, self.size, self.stride), seq.local, length)

        return seq.derive(("folding", self.size, self.stride, length), make)
