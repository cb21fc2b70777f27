"""GEGLU, the gated feed-forward layer of xLSTM's sLSTM blocks and of Gemma."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .swiglu import SwiGLU

APPROXIMATIONS = ("none", "tanh")


class GEGLU(SwiGLU):
    """Gated feed-forward layer with GELU for a gate (Shazeer, 2020, arXiv 2002.05202).

        y = W_down (gelu(W_gate x) * W_up x)

    approximate: of the GELU, "none" or "tanh" (Gemma 3, arXiv 2503.19786). Otherwise as `SwiGLU`. Raises ValueError for
    another approximation.
    """

    def __init__(self, *, width: int, hidden: int, bias: bool = False, approximate: str = "none") -> None:
        super().__init__(width=width, hidden=hidden, bias=bias)
        if approximate not in APPROXIMATIONS:
            raise ValueError(
                f"feed_forward.approximate must be one of {', '.join(APPROXIMATIONS)}; got {approximate!r}. Choose one"
            )
        self.approximate = approximate

    def each(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate=self.approximate) * self.up(x))
