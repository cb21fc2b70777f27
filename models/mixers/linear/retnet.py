"""RetNet's multi-scale retention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.normalisation import HeadNorm, RMSNorm
from ...layers.rotary import Rotary
from ...mixer import Mixer, head_size

NORMS = ("group", "rms")


class RetNet(Mixer):
    """Multi-scale retention (Sun et al., 2023, arXiv 2307.08621).

        S_t = gamma_h S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(key_dim)        q, k rotated by position
        gamma_h = 1 - 2^(-5 - h)                 h = 0 … H - 1, fixed, not learned
        y = W_o (silu(W_g x) * norm(o))

    norm: "group", that of the paper's equations, is GroupNorm_h, with a weight and a bias for each channel; "rms" is an
    RMS norm of each head with one weight for all, as flash-linear-attention has it. key_dim, value_dim: of a head; by
    default once and twice width / heads. Raises ValueError for sizes that do not divide, and for an unknown norm.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rope_base: float = 10000.0,
        norm: str = "group",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}. Choose one")
        self.heads = heads
        self.key_dim = head_size("heads", width, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = 2 * head_size("heads", width, heads, "value_dim") if value_dim is None else value_dim
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.rotary = Rotary(self.key_dim, rope_base)
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.gate = nn.Linear(width, values, bias=False)
        self.norm = HeadNorm(heads, self.value_dim, norm_eps) if norm == "group" else RMSNorm(self.value_dim, norm_eps)
        self.output = nn.Linear(values, width, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """`[H]` on x's device, in float32 or, for float64, float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        head = torch.arange(self.heads, device=x.device, dtype=dtype)
        return torch.log1p(-torch.exp2(-5 - head))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        q, k = self.rotary(q, seq), self.rotary(k, seq)
        out = ops.gated_linear_attention(q, k, v, self.log_decay(x), seq=seq)
        gate = self.gate(x)
        if isinstance(self.norm, RMSNorm):
            return self.output(self.norm(out, gate.view_as(out), "silu").flatten(-2))
        return self.output(self.norm(out, gate, "silu"))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)
