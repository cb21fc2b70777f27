"""Longhorn."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from ....kernels.pointwise import swiglu
from ....kernels.selective_scan import flops
from ....parallel import ops
from ....parallel.sequence import Sequence
from ...layers.decay_gate import GateLinear
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer


class Longhorn(Mixer):
    """A state space model that solves online regression (Longhorn, Liu et al., 2024, arXiv 2407.14207).

        x = silu(conv(W_x u))          low, k, q = W x          u the input
        delta = beta / (1 + beta |k|^2)          beta = sigmoid(W_delta low + b), one per channel of x
        S_t = (1 - delta_t k_t^2) S_(t-1) + delta_t x_t k_t          y_t = S_t q_t + D x_t
        out = W_o (y * silu(W_z u))

    This is the diagonal form in which it was released; the exact step of the paper multiplies the state by the matrix
    1 - delta k k^T, of which k^2 is the diagonal. expansion: channels of x over the width. state: size of k and q.
    step_rank: of low (default: width / 16, rounded up). conv_size: taps of the convolution. bias, conv_bias: of W_x,
    W_z and W_o, and of the convolution. Raises ValueError for sizes below 1.
    """

    small = MappingProxyType({"step_rank": 4})

    def __init__(
        self,
        *,
        width: int,
        expansion: float = 2,
        state: int = 16,
        step_rank: int | None = None,
        conv_size: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner, rank = int(expansion * width), -(-width // 16) if step_rank is None else step_rank
        for name, value in (("expansion * width", inner), ("state", state), ("step_rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.inner, self.sizes = inner, (rank, state, state)
        self.value = nn.Linear(width, inner, bias=bias)  # x
        self.gate = nn.Linear(width, inner, bias=bias)  # z
        self.conv = ShortConvolution(inner, conv_size, bias=conv_bias, activation="silu")
        self.selection = nn.Linear(inner, sum(self.sizes), bias=False)  # low, k, q
        self.step = GateLinear(rank, inner)  # beta
        self.D = nn.Parameter(torch.empty(inner))
        self.output = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        gate = self.gate(x)
        x = self.conv(self.value(x), seq)
        low, k, q = self.selection(x).split(self.sizes, dim=-1)
        beta = self.step(low).sigmoid()
        delta = beta / (1 + beta * k.to(beta.dtype).square().sum(-1, keepdim=True))
        out = ops.selective_scan(x, delta, None, k, q, decay="longhorn", seq=seq)
        return self.output(swiglu(gate, torch.addcmul(out, self.D.to(x.dtype), x)))

    def mixing_flops(self, seq: Sequence) -> int:
        return flops(seq.places, channels=self.inner, states=self.sizes[-1])

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "D":
            tensor.fill_(1.0)
        elif name == "step.weight":
            tensor.uniform_(-(tensor.shape[1] ** -0.5), tensor.shape[1] ** -0.5, generator=generator)
        else:
            return False
        return True
