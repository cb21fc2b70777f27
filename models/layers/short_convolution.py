"""The short causal convolution that many mixers put between their projections and their op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallel import ops
from ...parallel.sequence import Sequence


class ShortConvolution(nn.Module):
    """Depthwise causal convolution of `size` taps along the sequence, within documents: `[B, T, channels]` to the same.

        out_t = activation(sum_{d = 0 .. size-1} weight_{size-1-d} x_{t-d} + bias)        activation None or "silu"

    Weights start uniform within ±1 / sqrt(size), as torch's own convolutions do. Raises ValueError for size < 1.
    As in Mamba (Gu and Dao, 2023, arXiv 2312.00752).
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False, activation: str | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_size must be at least 1; got {size}. Use null for no convolution")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor | tuple[Tensor, ...], seq: Sequence, slot: str = "conv") -> Tensor | tuple[Tensor, ...]:
        return ops.short_conv(x, self.weight, seq=seq, bias=self.bias, activation=self.activation, slot=slot)

    def of_parts(self, parts: tuple[Tensor, ...], seq: Sequence, slot: str = "conv") -> tuple[Tensor, ...]:
        """Convolves tensors that share the channels: a call of the module, as ZeRO-3 gathers weights for calls."""
        return self(parts, seq, slot)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "weight":
            return False
        bound = tensor.shape[1] ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)
        return True
