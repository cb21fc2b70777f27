"""Comba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.delta_rule import flops
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

    What is erased is read from the state before it decays. That is the paper's form. The kernels of flash-linear-
    attention read the same, but its layer subtracts d b k before queries and keys are brought to length 1, and brings
    b k to length 1 too, which leaves b without effect on the state.

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
        times = self.heads // self.key_heads
        beta = self.strength(x)
        feedback = torch.sigmoid(self.feedback).repeat_interleave(times).view(-1, *[1] * (beta.dim() - 3))
        erased = (beta * feedback).to(k.dtype).unsqueeze(-1) * k.repeat_interleave(times, dim=2)
        last = k if self.steps == 1 else k[..., -1, :]
        q = q - self.correction.to(q.dtype)[:, None] * last
        return ops.delta_rule(q, k, v * beta.unsqueeze(-1), None, self.log_decay(x), erase=(-erased, k), seq=seq)

    def mixing_flops(self, seq: Sequence) -> int:
        tokens = seq.places * self.steps
        return flops(tokens, heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim, general=True)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name not in ("feedback", "correction"):
            return False
        tensor.fill_(1.0 if name == "feedback" else self.initial_correction)
        return True
