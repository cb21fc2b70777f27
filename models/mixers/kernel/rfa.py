"""Random feature attention, with and without its gate."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.feature_maps import Features, TrigonometricFeatures
from ...mixer import also_takes
from .kernel_attention import KernelAttention, of_heads


class RFA(KernelAttention):
    """Random feature attention (Peng et al., 2021, arXiv 2103.02143); with `gate` its gated form, RFA-Gate.

        S_t = g_t S_(t-1) + (1 - g_t) phi(k_t)^T v_t        z_t likewise for v = 1        g_t = sigmoid(w_g . x_t + b)
        o_t = phi(q_t) S_t / max(|phi(q_t) . z_t|, floor)
        phi(x) = [sin(w_m . u), cos(w_m . u)] / sqrt(D), m = 1 … D        u = x / |x|

    Without `gate` g and 1 - g are 1; a new model's gates begin with b from 3 to 6. An estimated sum of weights can be
    near 0, or negative. floor: the least divisor, where a key equal to the query has the weight 1; the published code
    takes the sum itself to be at least 0.16, for 64 features.
    seed: of the features w, drawn once from (seed, layer) and kept in checkpoints, where the paper chooses among many
    sets in training. features: D, by default key_dim.
    The other settings are those of `KernelAttention`. Raises ValueError as that does, and unless the floor is positive.
    """

    small = MappingProxyType({"features": 16})

    @also_takes(KernelAttention)
    def __init__(
        self,
        *,
        seed: int,
        layer: int,
        features: int | None = None,
        floor: float = 0.16,
        gate: bool = False,
        **kernel: Any,
    ) -> None:
        super().__init__(**kernel)
        if floor <= 0:
            raise ValueError(f"floor must be positive; got {floor}. 0.16 is that of the published code")
        size = self.key_dim if features is None else features
        self.feature_map = TrigonometricFeatures(self.key_dim, self.heads, self.kv_heads, size, seed, layer)
        self.floor = floor
        self.gate = GateLinear(self.query.in_features, self.heads) if gate else None

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        features, v = self.project(x, seq)
        log_decay = None
        if self.gate is not None:
            gate = self.gate(x)
            log_decay, fresh = F.logsigmoid(gate), torch.sigmoid(-gate).to(x.dtype).unsqueeze(-1)
            features = features._replace(k=of_heads(features.k, self.heads) * fresh)
        return self.output(self.attend(features, v, seq, log_decay).flatten(-2))

    def attend(self, features: Features, v: Tensor, seq: Sequence, log_decay: Tensor | None = None) -> Tensor:
        v = of_heads(v, self.heads)
        return ops.gated_linear_attention(
            features.q, features.k, v, log_decay, normaliser="at_least_one", scale=1 / self.floor, seq=seq
        )

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "gate.bias":
            return False
        tensor.copy_(torch.linspace(3.0, 6.0, len(tensor)))
        return True
