"""Additive fast weights with DPFP features."""

from __future__ import annotations

from typing import Any

from ...layers.feature_maps import DeterministicProjection
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class FastWeights(KernelAttention):
    """The fast weight programmer with additive updates and deterministic features (Schlag et al., 2021, arXiv
    2102.11174). With the delta rule in place of the sum it is DeltaNet.

        o_t = phi(q_t) S_t / phi(q_t) . z_t        S_t = S_(t-1) + phi(k_t)^T v_t        z_t = z_(t-1) + phi(k_t)
        phi(x) = [r_i r_(i-j)], j = 1 … nu         r = max([x, -x], 0), indices modulo 2 key_dim

    nu: 1 to 3 in the paper; there are 2 nu key_dim features. The other settings are those of `KernelAttention`. Raises
    ValueError as that does, and unless 1 <= nu < 2 key_dim.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, nu: int = 3, **kernel: Any) -> None:
        super().__init__(**kernel)
        self.feature_map = DeterministicProjection(self.key_dim, nu)
