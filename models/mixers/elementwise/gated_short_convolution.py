"""LFM2's gated short convolution."""

from __future__ import annotations

from torch import Tensor, nn

from ....kernels.short_conv import flops
from ....parallel.sequence import Sequence
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer


class GatedShortConvolution(Mixer):
    """A short convolution between two gates (LFM2, Liquid AI, 2025, arXiv 2511.23404).

        y = W_o (C * conv(B * v))          B, C, v = W_B x, W_C x, W_v x

    It sees conv_size tokens, and nothing beyond: a pattern needs other mixers beside it. conv_size: taps of the
    convolution. bias: of the linear layers and of the convolution. Raises ValueError for a conv_size below 1.
    """

    def __init__(self, *, width: int, conv_size: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.input_gate = nn.Linear(width, width, bias=bias)  # B
        self.output_gate = nn.Linear(width, width, bias=bias)  # C
        self.value = nn.Linear(width, width, bias=bias)
        self.conv = ShortConvolution(width, conv_size, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        return self.output(self.output_gate(x) * self.conv(self.input_gate(x) * self.value(x), seq))

    def mixing_flops(self, seq: Sequence) -> int:
        channels, taps = self.conv.weight.shape
        return flops(seq.places, channels=channels, taps=taps)
