"""Gated DeltaNet-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...mixer import also_takes
from .kimi_delta_attention import KimiDeltaAttention


class GatedDeltaNet2(KimiDeltaAttention):
    """Kimi Delta Attention that erases and writes by channel (Gated DeltaNet-2, Hatamizadeh et al., 2026, arXiv
    2605.22791).

        S_t = (I - k_t^T (b_t * k_t)) diag(exp(g_t)) S_(t-1) + k_t^T (w_t * v_t)       o_t = q_t S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head
        b = sigmoid(W_b x), a key channel             twice that with negative_eigenvalues
        w = sigmoid(W_w x), a value channel
        g_t = -exp(A_log) softplus(W_2 W_1 x + dt_bias)       A_log a head, dt_bias a channel
        y = W_o (sigmoid(W_4 W_3 x + bias) * RMSNorm(o))      the norm is within each head, with one weight for all

    b = w = beta is Kimi Delta Attention. Value heads that share a key share its b and g too. The settings and what is
    raised are those of `KimiDeltaAttention`, with gate_bias by default.
    """

    has_beta = False

    @also_takes(KimiDeltaAttention)
    def __init__(self, *, width: int, gate_bias: bool = True, **settings: Any) -> None:
        super().__init__(width=width, gate_bias=gate_bias, **settings)
        self.erase = nn.Linear(width, self.key.out_features, bias=False)
        self.write = nn.Linear(width, self.value.out_features, bias=False)

    @property
    def decay_heads(self) -> int:
        return self.key_heads

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        erase = k * self.bounded(self.by_step(self.erase(x), self.key_dim))
        v = v * torch.sigmoid(self.by_step(self.write(x), self.value_dim))
        log_decay = self.log_decay(x)
        assert log_decay is not None
        if self.key_heads < self.heads:
            log_decay = log_decay.repeat_interleave(self.heads // self.key_heads, dim=2)
        return ops.delta_rule(q, k, v, None, log_decay, erase=erase, seq=seq)
