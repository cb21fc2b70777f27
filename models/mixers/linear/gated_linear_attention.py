"""Gated linear attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.low_rank import LowRank
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class GatedLinearAttention(Mixer):
    """Linear attention with a data-dependent decay a key channel (GLA, Yang et al., 2024, arXiv 2312.06635).

        S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(key_dim)
        g_t = logsigmoid(W_2 W_1 x_t + b) / gate_normaliser          W_1 of rank gate_rank
        y = W_o (silu(W_r x) * RMSNorm(o))              the norm is within each head, with one weight for all heads

    key_dim, value_dim: of a head; by default half of and all of width / heads. conv_size: taps of a short convolution
    over q, k and v, with silu, or None for none. Without the gate_normaliser a new model forgets within a few tokens.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        gate_normaliser: float = 16.0,
        conv_size: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if gate_rank < 1 or gate_normaliser <= 0:
            raise ValueError(f"gate_rank and gate_normaliser must be positive; got {gate_rank} and {gate_normaliser}")
        self.heads, self.gate_normaliser = heads, gate_normaliser
        self.key_dim = head_size("2 * heads", width, 2 * heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.conv = None if conv_size is None else ShortConvolution(2 * keys + values, conv_size, activation="silu")
        self.decay = LowRank(width, gate_rank, outputs=keys, up=GateLinear)
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        parts = parts if self.conv is None else self.conv.of_parts(parts, seq)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        log_decay = (F.logsigmoid(self.decay(x)) / self.gate_normaliser).unflatten(-1, (self.heads, -1))
        out = ops.gated_linear_attention(q, k, v, log_decay, seq=seq)
        gate = self.gate(x).unflatten(-1, (self.heads, self.value_dim))
        return self.output(self.norm(out, gate, "silu").flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)
