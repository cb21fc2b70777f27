"""PolaFormer's polarity-aware linear attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....kernels.gated_linear import flops, whole
from ....parallel.sequence import Sequence
from ...layers.feature_maps import PolarityAware
from ...layers.short_convolution import ShortConvolution
from ...mixer import also_takes
from .kernel_attention import KernelAttention, of_heads


class PolaFormer(KernelAttention):
    """Linear attention that keeps the signs of queries and keys apart (Meng et al., 2025, arXiv 2501.15061).

        x+ = max(x / s, 0)^p      x- = max(-x / s, 0)^p      p = 1 + alpha sigmoid(a), s = softplus(b): per channel
        same_i = sum_j ([q+, q-]_i . [k+, k-]_j) v1_j / sum_j (…)          v1, v2: the halves of a head's values
        opposite_i = sum_j ([q-, q+]_i . [k+, k-]_j) v2_j / sum_j (…)
        y = W_o ((W_g x) * ([same, opposite] + conv(v)))

    The paper's own form, for images, is bidirectional, with a convolution over 5 x 5 patches, one for all heads, and
    learned positions on keys. Here it is causal by default, the convolution of `conv_size` taps (null for none) is
    causal along the sequence in both forms, and positions are left out. causal: False for sums over the whole document,
    which a language model refuses. The other settings are those of `KernelAttention`. Raises ValueError as that does,
    and for a value_dim that is odd.
    """

    @also_takes(KernelAttention)
    def __init__(self, *, alpha: float = 4.0, conv_size: int | None = 5, causal: bool = True, **kernel: Any) -> None:
        super().__init__(**kernel)
        if self.value_dim % 2:
            raise ValueError(f"value_dim must be even; got {self.value_dim}. Half of a head's values go with each sign")
        self.causal = causal
        self.feature_map = PolarityAware(self.key_dim, self.heads, self.kv_heads, alpha)
        channels = self.kv_heads * self.value_dim
        self.conv = None if conv_size is None else ShortConvolution(channels, conv_size)
        self.gate = nn.Linear(self.query.in_features, self.heads * self.value_dim, bias=self.query.bias is not None)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        features, v = self.project(x, seq)
        halves = of_heads(v, self.heads).unflatten(-1, (2, -1)).flatten(2, 3)  # one head each
        out = self.attend(features, halves, seq).flatten(-2)
        if self.conv is not None:
            near = self.conv(v.flatten(-2), seq).unflatten(-1, (self.kv_heads, -1))
            out = out + of_heads(near, self.heads).flatten(-2)
        return self.output(self.gate(x) * out)

    def mixing_flops(self, seq: Sequence) -> int:
        sizes = {"heads": 2 * self.heads, "key_dim": self.feature_map.size, "value_dim": self.value_dim // 2 + 1}
        return (flops if self.causal else whole.flops)(seq.places, **sizes)
