"""Gated DeltaNet, and DeltaNet."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...layers.decay_gate import DecayGate
from ...mixer import also_takes
from .delta_rule import DeltaRule

ACTIVATIONS = ("silu", "sigmoid")


class GatedDeltaNet(DeltaRule):
    """A delta rule with a decay a head (Gated DeltaNet, Yang et al., 2024, arXiv 2412.06464).

        S_t = exp(g_t) (I - beta_t k_t^T k_t) S_(t-1) + beta_t k_t^T v_t          o_t = q_t S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head
        beta = sigmoid(W_b x)                         twice that with negative_eigenvalues
        g_t = -exp(A_log) softplus(W_a x + dt_bias)
        y = W_o (silu(W_g x) * RMSNorm(o))            the norm is within each head, with one weight for all

    decay=False leaves g out, and with it gate=False the output gate: DeltaNet (Yang et al., 2024, arXiv 2406.06484).
    gate_activation: of the output gate, "silu" or "sigmoid", by default that of the equation. key_heads (default heads)
    divides heads: value heads that share queries and keys. key_dim, value_dim: of a head, by default width / heads.
    conv_size: taps of the short convolution, or None for none. steps: Householder steps per token, see
    `GatedDeltaProduct`. Raises ValueError for sizes that do not divide, for an unknown gate_activation, and for one
    without effect.
    """

    @also_takes(DeltaRule)
    def __init__(
        self,
        *,
        width: int,
        heads: int,
        decay: bool = True,
        gate: bool = True,
        gate_activation: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(width=width, heads=heads, **settings)
        if gate_activation is not None:
            if gate_activation not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise ValueError(f"gate_activation must be one of {known}; got {gate_activation!r}. Choose one")
            if not gate:
                raise ValueError(
                    f"gate_activation must be null with gate=false; got {gate_activation!r}. Leave one out"
                )
            self.activation = gate_activation
        if decay:
            self.decay, self.decay_gate = nn.Linear(width, heads, bias=False), DecayGate(heads)
        if gate:
            self.gate = nn.Linear(width, heads * self.value_dim, bias=False)
