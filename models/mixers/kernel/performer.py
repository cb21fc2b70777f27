"""Performer's FAVOR+ attention."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from ...layers.feature_maps import PositiveRandomFeatures
from ...mixer import also_takes
from .kernel_attention import KernelAttention


class Performer(KernelAttention):
    """Softmax attention estimated by positive orthogonal random features, FAVOR+ (Choromanski et al., 2021, arXiv
    2009.14794).

        o_t = phi(q_t) S_t / phi(q_t) . z_t        S_t = S_(t-1) + phi(k_t)^T v_t        z_t = z_(t-1) + phi(k_t)
        phi(x) = exp(w_m . x' - |x'|^2 / 2) / sqrt(F), m = 1 … F        x' = x / key_dim^(1/4)

    The features w are drawn once from (seed, layer), never again, and are kept in checkpoints; see
    `PositiveRandomFeatures` for what keeps the exponentials finite.
    seed: of the features, which differ from the seed of the run. features: F, by default key_dim log(key_dim).
    The other settings are those of `KernelAttention`. Raises ValueError as that does.
    """

    small = MappingProxyType({"features": 12})

    @also_takes(KernelAttention)
    def __init__(self, *, seed: int, layer: int, features: int | None = None, **kernel: Any) -> None:
        super().__init__(**kernel)
        size = round(self.key_dim * math.log(self.key_dim)) if features is None else features
        self.feature_map = PositiveRandomFeatures(self.key_dim, self.heads, self.kv_heads, size, seed, layer)
