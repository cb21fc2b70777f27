"""Gated DeltaProduct, and DeltaProduct."""

from __future__ import annotations

from typing import Any

from ...mixer import also_takes
from .gated_deltanet import GatedDeltaNet


class GatedDeltaProduct(GatedDeltaNet):
    """Several steps of the delta rule per token (DeltaProduct, Siems et al., 2025, arXiv 2502.10297).

        S_(t,j) = (I - beta_j k_j^T k_j) S_(t,j-1) + beta_j k_j^T v_j        S_(t,0) = exp(g_t) S_(t-1,n)
        o_t = q_t S_(t,n) / sqrt(key_dim)             after the steps j = 1 … n of token t
        q, k_j, v_j = silu(conv(W x)), then q and k_j at length 1 in each head      beta_j = 2 sigmoid(W_b x)
        g_t = -exp(A_log) softplus(W_a x + dt_bias)
        y = W_o (silu(W_g x) * RMSNorm(o))            the norm is within each head, with one weight for all

    With betas up to 2 each step can reflect the state, and a product of n reflections is any rotation of n dims.
    steps: n. negative_eigenvalues=False keeps betas within (0, 1). decay=False leaves g out (DeltaProduct). The other
    settings and what is raised are those of `GatedDeltaNet`. The state is no larger; keys and values are n times as
    many.
    """

    @also_takes(GatedDeltaNet)
    def __init__(self, *, steps: int = 2, negative_eigenvalues: bool = True, **settings: Any) -> None:
        super().__init__(steps=steps, negative_eigenvalues=negative_eigenvalues, **settings)
