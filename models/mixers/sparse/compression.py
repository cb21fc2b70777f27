"""Summaries of windows of tokens by a learned map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...part import linear_flops


class Compression(nn.Module):
    """phi(x_1 … x_l) = W_2 gelu(W_1 [x_1 + e_1; …; x_l + e_l]): `[B, W, l, heads, D]` to `[B, W, heads, D]`.

    Windows begin `stride` tokens apart. Heads share the weights; e is a learned embedding of the place in the window.
    """

    def __init__(self, size: int, stride: int, heads: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.stride, self.heads = stride, heads
        self.places = nn.Parameter(torch.empty(size, dim))
        self.first = nn.Linear(size * dim, hidden, bias=False)
        self.second = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x + self.places.unsqueeze(1)).transpose(2, 3).flatten(-2)
        return self.second(F.gelu(self.first(rows)))

    def flops(self, seq: Sequence) -> int:
        """Forward FLOPs of the layers, which run once per window and head."""
        return linear_flops(self, self.heads * ops.windows_held(seq, self.stride))
