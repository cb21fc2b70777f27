"""Comba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...mixer import also_takes
from .gated_deltanet import GatedDeltaNet


class Comba(GatedDeltaNet):
    """Gated DeltaNet whose state and output are corrected by feedback (Comba, Hu et al., 2025, arXiv 2506.02475).

        S_t = (exp(g_t) - beta_t b k_t^T k_t) S_(t-1) + beta_t k_t^T v_t        o_t = (q_t - d k_t) S_t / sqrt(key_dim)
        q, k, v = silu(conv(W x)), then q and k at length 1 in each head
        beta = sigmoid(W_b x)                         twice that with negative_eigenvalues
        g_t = -exp(A_log) softplus(W_a x + dt_bias)
        b = sigmoid(feedback), d = correction         two numbers for each key head
        y = W_o (sigmoid(W_g x) * RMSNorm(o))         the norm is within each head, with one weight for all

    What is erased is read from the state before it decays, as in the kernels of flash-linear-attention. Its layer
    differs: it subtracts d b k before queries and keys are brought to length 1, and brings b k to length 1 too, which
    leaves b without effect on the state. Here b and d act on keys of length 1, so that both do what the paper says.

    initial_correction: where d starts; the paper advises 0.02 for small models, 1 from a billion parameters on. The
    other settings and what is raised are those of `GatedDeltaNet`.
    """

    activation = "sigmoid"
    no_weight_decay = ("feedback", "correction")

    @also_takes(GatedDeltaNet)
    def __init__(self, *, initial_correction: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.initial_correction = initial_correction
        self.feedback = nn.Parameter(torch.empty(self.key_heads))
        self.correction = nn.Parameter(torch.empty(self.key_heads))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        per_head = (self.key_heads, *[1] * (k.dim() - 3))
        wide = torch.promote_types(k.dtype, torch.float32)  # its gradient is a sum over all tokens and channels
        erase = (k * torch.sigmoid(self.feedback.to(wide)).view(per_head)).to(k.dtype)
        last = k if self.steps == 1 else k[..., -1, :]
        q = q - self.correction.to(q.dtype)[:, None] * last
        return ops.delta_rule(q, k, v, self.strength(x), self.log_decay(x), erase=erase, erase_first=True, seq=seq)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("feedback", "correction"):
            return False
        tensor.fill_(1.0 if name == "feedback" else self.initial_correction)
        return True
