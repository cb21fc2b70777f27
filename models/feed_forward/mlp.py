"""MLP, the feed-forward layer of two matrices."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from ..part import FeedForward


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al., 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": squared_relu,
    "silu": F.silu,
}


class MLP(FeedForward):
    """Feed-forward layer without a gate (Vaswani et al., 2017, arXiv 1706.03762).

        y = W_down activation(W_up x)

    activation: "gelu" (GPT-3), "gelu_tanh", "relu", "squared_relu" (Nemotron) or "silu". bias: of both matrices.
    `[B, T, width]` to the same. Raises ValueError for another activation and if `hidden` is not positive.
    """

    stateless = True
    small = MappingProxyType({"hidden": 48})

    def __init__(self, *, width: int, hidden: int, activation: str = "gelu", bias: bool = False) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"feed_forward.hidden must be at least 1; got {hidden}. 4 times the width is usual")
        if activation not in ACTIVATIONS:
            raise ValueError(f"feed_forward.activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def each(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
