"""Additive attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.additive import AdditiveAttend, AdditiveInputs, ConcatenatedAttend, flops
from ....kernels.masks import Mask
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...mixer import also_takes
from .attention import Attention

SCORES = {"additive": AdditiveAttend, "concatenated": ConcatenatedAttend}


class AdditiveAttention(Attention):
    """Softmax attention by the sum of query and key (Bahdanau et al., 2015, arXiv 1409.0473).

        o_i = sum_j softmax_j(w . tanh(q_i + k_j)) v_j        j <= i in i's document, w per head

    score: "additive", or "concatenated" for LeakyReLU(w . q_i + w . k_j), which sees the query and key put side by side
    (graph attention, Velickovic et al., 2018, arXiv 1710.10903). For short rows: it computes every pair of a query and
    a key as it is defined. The other settings are those of `Attention`. Raises ValueError as that does.
    """

    no_weight_decay = ("weight",)

    @also_takes(Attention)
    def __init__(self, *, score: str = "additive", **attention: Any) -> None:
        super().__init__(**attention)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
        self.op = SCORES[score]
        self.weight = nn.Parameter(torch.empty(self.heads, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        return ops.attention(self.op, AdditiveInputs(q, k, v, self.weight), seq=seq)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(Mask()), heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "weight":
            return False
        tensor.normal_(0.0, self.head_dim**-0.5, generator=generator)
        return True
