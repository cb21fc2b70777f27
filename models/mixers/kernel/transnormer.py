"""TransNormer's attention without a divisor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....kernels.gated_linear import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.feature_maps import EluPlusOne
from ...layers.normalisation import RMSNorm
from ...mixer import also_takes
from .kernel_attention import KernelAttention, of_heads


class TransNormer(KernelAttention):
    """Kernel attention with a norm in place of the divisor, NormAttention (Qin et al., 2022, arXiv 2210.10340).

        S_t = S_(t-1) + phi(k_t)^T v_t        o_t = phi(q_t) S_t        phi(x) = elu(x) + 1
        y = W_o RMSNorm(o)                    the norm spans all heads

    The lower half of a TransNormer's layers has softmax attention within blocks of 64 tokens, DiagAttention:
    `SoftmaxAttention` with block=64. The settings are those of `KernelAttention`. Raises ValueError as that does.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, norm_eps: float = 1e-6, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.feature_map = EluPlusOne(self.key_dim)
        self.norm = RMSNorm(self.heads * self.value_dim, norm_eps)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        features, v = self.project(x, seq)
        out = ops.gated_linear_attention(features.q, features.k, of_heads(v, self.heads), scale=1.0, seq=seq)
        return self.output(self.norm(out.flatten(-2)))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, heads=self.heads, key_dim=self.feature_map.size, value_dim=self.value_dim)
