"""Kimi Delta Attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.delta_rule import flops
from ....kernels.pointwise import l2_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import DecayGate
from ...layers.low_rank import LowRank
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class KimiDeltaAttention(Mixer):
    """A delta rule with a decay a key channel (KDA, Kimi Linear, 2025, arXiv 2510.26692).

        S_t = (I - beta_t k_t^T k_t) diag(exp(g_t)) S_(t-1) + beta_t k_t^T v_t       o_t = q_t S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head       beta = sigmoid(W_b x)
        g_t = -exp(A_log) softplus(W_2 W_1 x + dt_bias)       A_log a head, dt_bias a channel
        y = W_o (sigmoid(W_4 W_3 x) * RMSNorm(o))             the norm is within each head, with one weight for all

    head_dim: of queries, keys and values alike, by default width / heads; W_1 and W_3 are of rank gate_rank, by default
    head_dim. conv_size: taps of the short convolution, or None for none. Raises ValueError for a width that heads do
    not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_dim: int | None = None,
        gate_rank: int | None = None,
        conv_size: int | None = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_size("heads", width, heads) if head_dim is None else head_dim
        rank = self.head_dim if gate_rank is None else gate_rank
        if rank < 1:
            raise ValueError(f"gate_rank must be at least 1; got {rank}")
        inner = heads * self.head_dim
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.conv = None if conv_size is None else ShortConvolution(3 * inner, conv_size, activation="silu")
        self.beta = nn.Linear(width, heads, bias=False)
        self.decay = LowRank(width, rank, outputs=inner, bias=False)
        self.decay_gate = DecayGate(heads, self.head_dim, rates=(1.0, 16.0))
        self.gate = LowRank(width, rank, outputs=inner, bias=False)
        self.norm = RMSNorm(self.head_dim, norm_eps)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        parts = map(F.silu, parts) if self.conv is None else self.conv.of_parts(parts, seq)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in parts)
        beta, log_decay = torch.sigmoid(self.beta(x)), self.decay_gate(self.decay(x))
        out = ops.delta_rule(l2_norm(q), l2_norm(k), v, beta, log_decay, seq=seq)
        gate = self.gate(x).unflatten(-1, (self.heads, self.head_dim))
        return self.output(self.norm(out, gate, "sigmoid").flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.head_dim, value_dim=self.head_dim)
