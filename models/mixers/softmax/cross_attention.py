"""Cross attention: queries of one layer, keys and values of what an earlier layer has made of the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....parallel.sequence import Sequence
from ...mixer import also_takes
from ...part import Part
from .softmax_attention import SoftmaxAttention


class HiddenStates(Part):
    """Publishes its input, the normed residual stream of its place, for later layers of `CrossAttention`.

    memory = x        y = 0: nothing is added to the residual stream
    """

    def __init__(self, *, width: int, name: str = "") -> None:
        super().__init__()
        self.publishes = (f"{name}.memory",)
        self.widths = {self.publishes[0]: width}

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        return x.new_zeros(()).expand_as(x), x


class CrossAttention(SoftmaxAttention):
    """Softmax attention to a memory, the hidden states of an earlier layer (Vaswani et al., 2017, arXiv 1706.03762).

        o_i = sum_j softmax_j(W_q x_i . W_k m_j / sqrt(head_dim)) W_v m_j        j <= i in i's document

    The memory has one entry per token, so that a language model stays causal, and every layer projects it for itself. A
    memory of another length, such as an encoder's outputs, has no place in the rows of a run.
    memory_of: what publishes it, by its name in the pattern: `HiddenStates`, or another part with a memory as wide as
    the model. The other settings are those of `SoftmaxAttention`, whose `share` and `keys_of` have no place here.
    """

    @also_takes(SoftmaxAttention)
    def __init__(self, *, memory_of: str, **attention: Any) -> None:
        super().__init__(**attention)
        self.reads = (f"{memory_of}.memory",)
        self.widths = {self.reads[0]: self.key.in_features}

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor:
        (memory,) = read
        return self.gated(x, self.attend(*self.project(x, seq, memory), seq))
