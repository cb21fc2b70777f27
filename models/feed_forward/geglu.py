"""GEGLU, the gated feed-forward layer of xLSTM's sLSTM blocks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...parallel.sequence import Sequence
from .swiglu import SwiGLU


class GEGLU(SwiGLU):
    """Gated feed-forward layer with GELU for a gate (Shazeer, 2020, arXiv 2002.05202).

        y = W_down (gelu(W_gate x) * W_up x)

    Otherwise as `SwiGLU`.
    """

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))
