"""SGLU, the feed-forward layer of TransNormerLLM."""

from __future__ import annotations

from torch import Tensor

from .swiglu import SwiGLU


class SGLU(SwiGLU):
    """Simple gated linear unit: SwiGLU without the activation (Qin et al., 2023, arXiv 2307.14995).

        y = W_down (W_gate x * W_up x)

    `[B, T, width]` to the same. Raises ValueError if `hidden` is not positive.
    """

    def __init__(self, *, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__(width=width, hidden=hidden, bias=bias)

    def each(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))
