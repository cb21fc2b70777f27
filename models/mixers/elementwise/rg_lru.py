"""The recurrent block of Griffin and RecurrentGemma."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....kernels.diagonal_scan import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.block_diagonal import BlockDiagonalLinear
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer

RATE = 8.0
LEAST = 2.5e-7  # of 1 - a^2 in the slope of its square root, which is at most 1000 so


def _root(x: Tensor) -> Tensor:
    """The square root, whose slope has a bound as in the authors' code: at 0 it would be infinite."""
    root = x.detach().sqrt()
    tangent = x / (2 * root.clamp(min=LEAST**0.5))
    return root + (tangent - tangent.detach())


class RGLRU(Mixer):
    """The recurrent block around a real-gated linear recurrent unit (Griffin, De et al., 2024, arXiv 2402.19427).

        x = conv(W_x u)          r = sigmoid(W_r x + b_r)          i = sigmoid(W_i x + b_i)          u the input
        log a_t = -8 softplus(Lambda) r_t          h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (i_t * x_t)
        y = W_o (h * gelu(W_y u))

    The first token of a document enters without the square root, as in RecurrentGemma. inner: channels of x, the width
    by default. blocks: of the block-diagonal W_r and W_i. conv_size: taps of the convolution. bias: of W_x, W_y and
    W_o. New units keep between 0.9 and 0.999 of their state where r is 1/8. Raises ValueError where blocks do not
    divide inner.
    """

    in_float32 = ("Lambda", "recurrence_bias")
    small = MappingProxyType({"blocks": 4})

    def __init__(
        self, *, width: int, blocks: int, inner: int | None = None, conv_size: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        self.recurrence_gate = BlockDiagonalLinear(inner, blocks)  # r
        self.input_gate = BlockDiagonalLinear(inner, blocks)  # i
        self.recurrence_bias = nn.Parameter(torch.empty(inner))
        self.input_bias = nn.Parameter(torch.empty(inner))
        self.Lambda = nn.Parameter(torch.empty(inner))
        self.value = nn.Linear(width, inner, bias=bias)  # x
        self.gate = nn.Linear(width, inner, bias=bias)  # y
        self.conv = ShortConvolution(inner, conv_size, bias=True)
        self.output = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        gate = F.gelu(self.gate(x), approximate="tanh")
        x = self.conv(self.value(x), seq)
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of log decays over many tokens are exponents
        recurrence = torch.sigmoid(self.recurrence_gate(x).to(wide) + self.recurrence_bias.to(wide))
        log_decay = -RATE * F.softplus(self.Lambda.to(wide)) * recurrence
        root = _root(-torch.expm1(2 * log_decay))
        root = torch.where(seq.positions(x.device).unsqueeze(-1) == 0, 1.0, root)
        entering = torch.sigmoid(self.input_gate(x) + self.input_bias.to(x.dtype)) * x
        out = ops.diagonal_scan(entering * root.to(x.dtype), log_decay, seq=seq)
        return self.output(out * gate)

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=len(self.Lambda))

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "Lambda":  # exp(-softplus(Lambda)) has a square that is uniform
            rate = tensor.uniform_(0.9**2, 0.999**2, generator=generator).log_().mul_(-0.5)
            tensor.copy_(rate.expm1().log())
        elif name in ("recurrence_bias", "input_bias"):
            tensor.zero_()
        else:
            return False
        return True
