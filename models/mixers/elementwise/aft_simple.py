"""AFT-simple: attention without queries that meet keys, and without positions."""

from __future__ import annotations

from torch import Tensor, nn

from ....kernels.wkv import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...mixer import Mixer


class AFTSimple(Mixer):
    """An attention-free transformer without position biases (AFT-simple, Zhai et al., 2021, arXiv 2105.14103).

        o_t = sum over s <= t of exp(k_s) v_s / sum over s <= t of exp(k_s)          channel by channel
        y = W_o (sigmoid(q) * o)          q, k, v = W_q x, W_k x, W_v x

    inner: channels of q, k and v, the width by default. It is RWKV-4's recurrence without decay and bonus. The state is
    a sum of values, a sum of weights and their log scale per channel. Raises ValueError for an inner below 1.
    """

    def __init__(self, *, width: int, inner: int | None = None) -> None:
        super().__init__()
        self.inner = width if inner is None else inner
        if self.inner < 1:
            raise ValueError(f"inner must be at least 1; got {inner}. Leave it out for the width")
        self.query = nn.Linear(width, self.inner, bias=False)
        self.key = nn.Linear(width, self.inner, bias=False)
        self.value = nn.Linear(width, self.inner, bias=False)
        self.output = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        out = ops.wkv(self.key(x), self.value(x), seq=seq).to(x.dtype)
        return self.output(self.query(x).sigmoid() * out)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=self.inner)
