"""Compressed attention across ranks: every rank has the summaries of all windows, so that nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.compressed import Folding, attend, attend_backward, check_inputs
from ...kernels.operation import Tensors
from ...kernels.select_blocks import WindowLayout
from ..operation import Operation, present
from ..sequence import Sequence


@dataclass(frozen=True)
class CompressedAttention(Operation):
    """Attention of the queries held here to the windows of the whole row that lie in their past.

    An `Operation`; its inputs are (q, k, v), those summaries as `gather_windows` and `window_means` give them. The
    outputs are float32 (float64): out `[B, T, H, V]` and the log-sum-exp `[B, T, H]`, which carries no gradient.
    """

    size: int
    stride: int
    scale: float
    outputs: ClassVar[int] = 2

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensors, Tensors]:
        q, k, v = present(*inputs)
        folding = self._folding(seq, k.shape[1])
        check_inputs(q, k, v, folding.windows, folding.documents)
        out, lse = attend(q, k, v, folding=folding, scale=self.scale, backend=seq.backend)
        return (out, lse), ()

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, seq: Sequence
    ) -> Tensors:
        q, k, v = present(*inputs)
        out, lse = outputs
        dout = torch.zeros_like(out) if gradients[0] is None else gradients[0]
        dq, dk, dv = attend_backward(
            dout, q, k, v, out, lse, folding=self._folding(seq, k.shape[1]),
            scale=self.scale, backend=seq.backend,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[tuple[Tensor, ...], Tensors]:
        q, _, v = present(*inputs)
        exact = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        return (exact.new_empty((*q.shape[:-1], v.shape[-1])), exact), ()

    def _folding(self, seq: Sequence, length: int) -> Folding:
        def make() -> Folding:
            return Folding(WindowLayout(seq.documents, self.size, self.stride), seq.local, length)

        return seq.derive(("folding", self.size, self.stride, length), make)
