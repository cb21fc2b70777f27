"""Linear attention, as the Linear Transformer has it."""

from __future__ import annotations

from typing import Any

from ...layers.feature_maps import EluPlusOne
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class LinearAttention(KernelAttention):
    """Attention with the weights phi(q) . phi(k) (Linear Transformer, Katharopoulos et al., 2020, arXiv 2006.16236).

        o_t = phi(q_t) S_t / phi(q_t) . z_t        S_t = S_(t-1) + phi(k_t)^T v_t        z_t = z_(t-1) + phi(k_t)
        phi(x) = elu(x) + 1

    causal: False for sums over the whole document, which a language model refuses. The other settings are those of
    `KernelAttention`. Raises ValueError as that does.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, causal: bool = True, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.causal = causal
        self.feature_map = EluPlusOne(self.key_dim)
