"""ReLU linear attention, as SANA has it."""

from __future__ import annotations

from typing import Any

from ...layers.feature_maps import Relu
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class ReLULinearAttention(KernelAttention):
    """Attention with the weights max(q, 0) . max(k, 0) (SANA, Xie et al., 2024, arXiv 2410.10629).

        o_t = phi(q_t) S_t / phi(q_t) . z_t        S_t = S_(t-1) + phi(k_t)^T v_t        z_t = z_(t-1) + phi(k_t)
        phi(x) = max(x, 0)

    SANA's own form, for images, is bidirectional; its Mix-FFN and its 1e-15 in the divisor are not here: without any
    weight the output is 0. causal: False for sums over the whole document, which a language model refuses.
    The other settings are those of `KernelAttention`. Raises ValueError as that does.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, causal: bool = True, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.causal = causal
        self.feature_map = Relu(self.key_dim)
