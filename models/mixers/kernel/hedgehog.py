"""Hedgehog's attention."""

from __future__ import annotations

from typing import Any

from ...layers.feature_maps import HedgehogMap
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class Hedgehog(KernelAttention):
    """Attention with learned features that are spiky as softmax weights are (Zhang et al., 2024, arXiv 2402.04347).

        o_t = phi(q_t) S_t / phi(q_t) . z_t        S_t = S_(t-1) + phi(k_t)^T v_t        z_t = z_(t-1) + phi(k_t)
        phi(x) = softmax([2 y, -2 y])        y = W_h x + b_h, one for queries and one for keys

    A new W_h is the identity. The other settings are those of `KernelAttention`. Raises ValueError as that does.
    """

    @also_takes(KernelAttention)
    def __init__(self, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.feature_map = HedgehogMap(self.key_dim, self.heads, self.kv_heads)
