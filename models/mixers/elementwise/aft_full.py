"""AFT-full: attention without queries that meet keys, with learned biases of pairs of positions."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.attention_free import AttentionFree, AttentionFreeInputs, flops
from ....kernels.masks import Mask
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...mixer import Mixer

CAUSAL = Mask()


class AFTFull(Mixer):
    """An attention-free transformer with position biases (AFT-full, Zhai et al., 2021, arXiv 2105.14103).

        o_t = sum over s <= t of exp(k_s + w_ts) v_s / sum over s <= t of exp(k_s + w_ts)          channel by channel
        w_ts = a_t . b_s          y = W_o (sigmoid(q) * o)          q, k, v = W_q x, W_k x, W_v x

    The bias w of each pair of positions is factored, as in the paper: a and b are learned for each position of a
    document, so that there is a longest one. It is no recurrence: work grows with the square of the length, and
    decoding keeps all keys. max_length: of documents, in tokens. rank: of the biases. inner: channels of q, k and v,
    the width by default. Raises ValueError for sizes below 1, and for a document longer than max_length.
    """

    no_weight_decay = ("row", "column")
    small = MappingProxyType({"rank": 8})

    def __init__(self, *, width: int, max_length: int, rank: int = 128, inner: int | None = None) -> None:
        super().__init__()
        self.inner = width if inner is None else inner
        for name, value in (("max_length", max_length), ("rank", rank), ("inner", self.inner)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.max_length, self.rank = max_length, rank
        self.row = nn.Parameter(torch.empty(max_length, rank))  # a
        self.column = nn.Parameter(torch.empty(max_length, rank))  # b
        self.query = nn.Linear(width, self.inner, bias=False)
        self.key = GateLinear(width, self.inner, bias=False)  # an exponent
        self.value = nn.Linear(width, self.inner, bias=False)
        self.output = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        positions = seq.positions_within(self.max_length, x.device)
        row, column = (F.embedding(positions, table).unsqueeze(2) for table in (self.row, self.column))
        q = self.query(x)
        k, v = self.key(x).unsqueeze(-1), self.value(x).unsqueeze(-1)  # a head for each channel
        inputs = AttentionFreeInputs(q.unsqueeze(-1), k, v, row, column)
        out = ops.attention(AttentionFree, inputs, seq=seq)
        return self.output(q.sigmoid() * out.squeeze(-1))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.pairs(CAUSAL), channels=self.inner, rank=self.rank)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("row", "column"):
            return False
        tensor.normal_(0.0, 0.1, generator=generator)
        return True
