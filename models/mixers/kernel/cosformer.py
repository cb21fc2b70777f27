"""cosFormer's attention."""

from __future__ import annotations

from typing import Any

from ...layers.feature_maps import CosineReweighting
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class CosFormer(KernelAttention):
    """Attention with ReLU features that are reweighted by distance (cosFormer, Qin et al., 2022, arXiv 2202.08791).

        o_i = sum_j w_ij v_j / sum_j w_ij        w_ij = max(q_i, 0) . max(k_j, 0) cos(pi (i - j) / (2 max_length))

    max_length: the most tokens that a document may have. The paper takes the length of each row instead, by which a
    token's output would depend on what follows. The other settings are those of `KernelAttention`. Raises ValueError as
    that does, and, when it runs, for a longer document. Where all weights are 0 the output is 0, where the published
    code divides by 1e-6.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, max_length: int, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.feature_map = CosineReweighting(self.key_dim, max_length)
