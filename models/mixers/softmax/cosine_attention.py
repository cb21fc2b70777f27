"""Cosine attention: softmax attention whose logits are cosines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.pointwise import l2_norm
from ....parallel.sequence import Sequence
from ...mixer import also_takes
from .softmax_attention import SoftmaxAttention

MOST = math.log(100.0)


class CosineAttention(SoftmaxAttention):
    """Softmax attention by the cosines of queries and keys (Swin V2, Liu et al., 2022, arXiv 2111.09883).

        o_i = sum_j softmax_j(tau q_i . k_j / (|q_i| |k_j|)) v_j        tau = exp(min(log_scale, log 100)) per head

    log_scale starts at log 10. The other settings are those of `SoftmaxAttention`. Raises ValueError as that does.
    """

    in_float32 = ("log_scale",)
    measures_logits = False  # cosines undo a scale of the queries

    @also_takes(SoftmaxAttention)
    def __init__(self, **attention: Any) -> None:
        super().__init__(**attention)
        if self.key_multiplier != 1.0:
            raise ValueError(
                f"key_multiplier must be 1, since cosines undo it; got {self.key_multiplier}. Leave it out"
            )
        if self.scale is not None:
            raise ValueError(f"scale must be null, since each head learns its own; got {self.scale}. Leave it out")
        self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(10.0)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, **settings: Any) -> Tensor:
        scale = self.log_scale.clamp(max=MOST).exp().unsqueeze(-1)
        q = (l2_norm(q) * scale).to(q.dtype)
        return super().attend(q, l2_norm(k), v, seq, **{**settings, "scale": 1.0})

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "log_scale":
            return super().initialise_parameter(name, tensor, generator)
        tensor.fill_(math.log(10.0))
        return True
