"""Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.delta_rule import flops
from ....kernels.pointwise import l2_norm
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import DecayGate
from ...layers.normalisation import RMSNorm
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer, head_size


class GatedDeltaNet(Mixer):
    """A delta rule with a decay a head (Gated DeltaNet, Yang et al., 2024, arXiv 2412.06464).

        S_t = exp(g_t) (I - beta_t k_t^T k_t) S_(t-1) + beta_t k_t^T v_t          o_t = q_t S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head
        beta = sigmoid(W_b x)                         twice that with negative_eigenvalues
        g_t = -exp(A_log) softplus(W_a x + dt_bias)
        y = W_o (silu(W_g x) * RMSNorm(o))            the norm is within each head, with one weight for all heads

    key_heads (default heads) divides heads: value heads that share queries and keys. key_dim, value_dim: of a head, by
    default width / heads. conv_size: taps of the short convolution, or None for none. decay=False leaves g out
    (DeltaNet, Yang et al., 2024, arXiv 2406.06484). Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        decay: bool = True,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if key_heads < 1 or heads % key_heads:
            raise ValueError(f"key_heads must divide heads={heads}; got {key_heads}. Change one of them")
        self.heads, self.key_heads, self.negative_eigenvalues = heads, key_heads, negative_eigenvalues
        self.key_dim = head_size("heads", width, heads) if key_dim is None else key_dim
        self.value_dim = head_size("heads", width, heads) if value_dim is None else value_dim
        keys, values = key_heads * self.key_dim, heads * self.value_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.conv = None if conv_size is None else ShortConvolution(2 * keys + values, conv_size, activation="silu")
        self.beta = nn.Linear(width, heads, bias=False)
        self.decay = nn.Linear(width, heads, bias=False) if decay else None
        self.decay_gate = DecayGate(heads) if decay else None
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        parts = self.query(x), self.key(x), self.value(x)
        q, k, v = map(F.silu, parts) if self.conv is None else self.conv.of_parts(parts, seq)
        q, k = (l2_norm(part.unflatten(-1, (self.key_heads, self.key_dim))) for part in (q, k))
        beta = torch.sigmoid(self.beta(x))
        if self.negative_eigenvalues:
            beta = 2 * beta
        log_decay = None
        if self.decay is not None and self.decay_gate is not None:
            log_decay = self.decay_gate(self.decay(x))
        out = ops.delta_rule(q, k, v.unflatten(-1, (self.heads, self.value_dim)), beta, log_decay, seq=seq)
        gate = self.gate(x).unflatten(-1, (self.heads, self.value_dim))
        return self.output(self.norm(out, gate, "silu").flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)
