"""Decaying fast weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...mixer import Mixer, head_size


class DecayingFastWeights(Mixer):
    """Linear attention whose state decays by a matrix of rank one (DFW, Mao, 2022, arXiv 2210.04243).

        S_t = (z_t^T f_t) * S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(key_dim)        y = W_o o
        z_t = sigmoid(W_z x_t + b_z)                   f_t = sigmoid(W_f x_t + b_f)

    in each head: z holds a gate per key channel, f one per value channel. There is neither a feature map nor a
    normaliser. key_dim, value_dim: of a head, by default width / heads. The recurrence is that of the paper's released
    code, which has no model around it; that gates start open, with biases between 3 and 6, is ours. Raises ValueError
    for sizes that do not divide.
    """

    def __init__(self, *, width: int, heads: int, key_dim: int | None = None, value_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.key_forget = GateLinear(width, keys)  # z
        self.value_forget = GateLinear(width, values)  # f
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x), self.key_forget(x), self.value_forget(x)
        q, k, v, z, f = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        out = ops.gated_linear_attention(q, k, v, F.logsigmoid(z), value_log_decay=F.logsigmoid(f), seq=seq)
        return self.output(out.flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("key_forget.bias", "value_forget.bias"):
            return False
        tensor.copy_(torch.linspace(3.0, 6.0, len(tensor)))
        return True
