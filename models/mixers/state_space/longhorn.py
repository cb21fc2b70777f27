"""Longhorn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...mixer import also_takes
from .selective import SelectiveScan


class Longhorn(SelectiveScan):
    """A state space model that solves online regression (Longhorn, Liu et al., 2024, arXiv 2407.14207).

        x = silu(conv(W_x u))          low, k, q = W x          u the input
        delta = beta / (1 + beta |k|^2)          beta = sigmoid(W_delta low + b), one per channel of x
        S_t = (1 - delta_t k_t^2) S_(t-1) + delta_t x_t k_t          y_t = S_t q_t + D x_t
        out = W_o (y * silu(W_z u))

    This is the diagonal form in which it was released; the exact step of the paper multiplies the state by the matrix
    1 - delta k k^T. state is the size of k and q; the other settings, and what is raised, are those of `SelectiveScan`.
    """

    @also_takes(SelectiveScan)
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.step = GateLinear(self.sizes[0], self.inner)  # beta

    def scan(self, x: Tensor, low: Tensor, b: Tensor, c: Tensor, seq: Sequence) -> Tensor:
        beta = self.step(low).sigmoid()
        delta = beta / (1 + beta * b.to(beta.dtype).square().sum(-1, keepdim=True))
        return ops.selective_scan(x, delta, None, b, c, decay="longhorn", seq=seq)
