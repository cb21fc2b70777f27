"""SwiGLU, the gated feed-forward layer of most language models."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from ...kernels.pointwise import swiglu
from ...parallel.sequence import Sequence
from ..part import FeedForward


class SwiGLU(FeedForward):
    """Gated feed-forward layer (Shazeer, 2020, arXiv 2002.05202).

        y = W_down (silu(W_gate x) * W_up x)

    `[B, T, width]` to the same. Raises ValueError if `hidden` is not positive.
    """

    small = MappingProxyType({"hidden": 48})

    def __init__(self, *, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"feed_forward.hidden must be at least 1; got {hidden}. About 8/3 of the width is usual")
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.down(swiglu(self.gate(x), self.up(x)))
