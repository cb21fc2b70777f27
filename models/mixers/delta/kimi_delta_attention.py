"""Kimi Delta Attention."""

from __future__ import annotations

from torch import nn

from ...layers.decay_gate import DecayGate
from ...layers.low_rank import LowRank
from .delta_rule import DeltaRule


class KimiDeltaAttention(DeltaRule):
    """A delta rule with a decay a key channel (KDA, Kimi Linear, 2025, arXiv 2510.26692).

        S_t = (I - beta_t k_t^T k_t) diag(exp(g_t)) S_(t-1) + beta_t k_t^T v_t       o_t = q_t S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head       beta = sigmoid(W_b x)
        g_t = -exp(A_log) softplus(W_2 W_1 x + dt_bias)       A_log a head, dt_bias a channel
        y = W_o (sigmoid(W_4 W_3 x) * RMSNorm(o))             the norm is within each head, with one weight for all

    lower_bound, a negative number, makes the decay g_t = lower_bound * sigmoid(exp(A_log) (W_2 W_1 x + dt_bias)), as
    later models of this kind have it with -5: another map, not the first one cut off.

    head_dim: of queries, keys and values, by default width / heads; value_dim: of values, where it is another. W_1 and
    W_3 are of rank gate_rank, by default value_dim; low_rank=False makes W_2 W_1 and W_4 W_3 one matrix each, as in
    Ling 3. gate_bias adds a bias after W_4. key_heads (default heads) divides heads: value heads that share queries and
    keys. conv_size: taps of the short convolution, or None for none. negative_eigenvalues doubles beta. steps: see
    `GatedDeltaProduct`. Raises ValueError for sizes that do not divide, for a bound that is not negative, and for a
    gate_rank without effect.
    """

    activation = "sigmoid"

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int | None = None,
        low_rank: bool = True,
        gate_bias: bool = False,
        lower_bound: float | None = None,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = False,
        steps: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            width=width, heads=heads, key_heads=key_heads, key_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim, conv_size=conv_size,
            negative_eigenvalues=negative_eigenvalues, steps=steps, norm_eps=norm_eps,
        )  # fmt: skip
        rank = self.value_dim if gate_rank is None else gate_rank
        if rank < 1:
            raise ValueError(f"gate_rank must be at least 1; got {rank}")
        if not low_rank and gate_rank is not None:
            raise ValueError(f"gate_rank must be null with low_rank=false; got {gate_rank}. Leave one of them out")
        decays, values = self.decay_heads * self.key_dim, heads * self.value_dim
        self.decay_gate = DecayGate(self.decay_heads, self.key_dim, rates=(1.0, 16.0), lower_bound=lower_bound)
        if low_rank:
            self.decay = LowRank(width, rank, outputs=decays, bias=False)
            self.gate = LowRank(width, rank, outputs=values, bias=gate_bias)
        else:
            self.decay = nn.Linear(width, decays, bias=False)
            self.gate = nn.Linear(width, values, bias=gate_bias)

    @property
    def decay_heads(self) -> int:
        """Heads that decay differently."""
        return self.heads
