"""SwiGLU, the gated feed-forward layer of most language models."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from ...kernels.pointwise import clamped_swiglu, swiglu
from ..part import FeedForward


class SwiGLU(FeedForward):
    """Gated feed-forward layer (Shazeer, 2020, arXiv 2002.05202).

        y = down_multiplier * W_down (silu(gate_multiplier * W_gate x) * W_up x)

    `[B, T, width]` to the same. The multipliers are constants, those of Falcon-H1 (arXiv 2507.22448). limit: what the
    gate and W_up x are clamped to, with the activation of gpt-oss: see `clamped_swiglu`. Raises ValueError if `hidden`
    or `limit` is not positive.
    """

    stateless = True
    small = MappingProxyType({"hidden": 48})

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        bias: bool = False,
        gate_multiplier: float = 1.0,
        down_multiplier: float = 1.0,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        check_limit(limit)
        if hidden < 1:
            raise ValueError(f"feed_forward.hidden must be at least 1; got {hidden}. About 8/3 of the width is usual")
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.gate_multiplier, self.down_multiplier, self.limit = gate_multiplier, down_multiplier, limit

    def each(self, x: Tensor) -> Tensor:
        gate = self.gate(x) if self.gate_multiplier == 1.0 else self.gate(x) * self.gate_multiplier
        out = self.down(gated(gate, self.up(x), self.limit))
        return out if self.down_multiplier == 1.0 else out * self.down_multiplier


def gated(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """`swiglu`, or with a limit `clamped_swiglu`."""
    return swiglu(gate, up) if limit is None else clamped_swiglu(gate, up, limit)


def check_limit(limit: float | None) -> None:
    """Raises ValueError for a limit that is not positive."""
    if limit is not None and limit <= 0:
        raise ValueError(f"feed_forward.limit must be positive; got {limit}. gpt-oss has 7, and null leaves it out")
