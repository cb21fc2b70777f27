"""What the mixers of the selective scan share."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ....kernels.pointwise import swiglu
from ....kernels.selective_scan import flops
from ....parallel.sequence import Sequence
from ...layers.short_convolution import ShortConvolution
from ...mixer import Mixer


class SelectiveScan(Mixer):
    """The block around a selective scan, as in Mamba (Gu and Dao, 2023, arXiv 2312.00752).

        x = silu(conv(W_x u))          low, B, C = W x          u the input
        y = scan(x, low, B, C) + D x          out = W_o (y * silu(W_z u))

    expansion: channels of x over the width. state: N, the states of a channel. step_rank: of low (default: width / 16,
    rounded up). conv_size: taps of the convolution. bias, conv_bias: of W_x, W_z and W_o, and of the convolution.
    publish: whether y is published, as the memory of gated memory units in later layers (SambaY, arXiv 2507.06607).
    A subclass has the layer `step`, of low, and says the scan. Raises ValueError for sizes below 1.
    """

    small = MappingProxyType({"step_rank": 4})
    step: nn.Linear

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
        publish: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.publishes = (f"{name}.memory",) if publish else ()
        inner, rank = int(expansion * width), -(-width // 16) if step_rank is None else step_rank
        for setting, value in (("expansion * width", inner), ("state", state), ("step_rank", rank)):
            if value < 1:
                raise ValueError(f"{setting} must be at least 1; got {value}")
        self.inner, self.sizes = inner, (rank, state, state)
        self.widths = dict.fromkeys(self.publishes, inner)
        self.value = nn.Linear(width, inner, bias=bias)  # x
        self.gate = nn.Linear(width, inner, bias=bias)  # z
        self.conv = ShortConvolution(inner, conv_size, bias=conv_bias, activation="silu")
        self.selection = nn.Linear(inner, sum(self.sizes), bias=False)  # low, B, C
        self.D = nn.Parameter(torch.empty(inner))
        self.output = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor | tuple[Tensor, ...]:
        gate = self.gate(x)
        x = self.conv(self.value(x), seq)
        low, b, c = self.selection(x).split(self.sizes, dim=-1)
        out = self.scan(x, low, b, c, seq)
        memory = torch.addcmul(out, self.D.to(x.dtype), x)
        result = self.output(swiglu(gate, memory))
        return (result, memory) if self.publishes else result

    @abstractmethod
    def scan(self, x: Tensor, low: Tensor, b: Tensor, c: Tensor, seq: Sequence) -> Tensor:
        """x `[B, T, D]`, low `[B, T, step_rank]`, b and c `[B, T, N]` to `[B, T, D]`."""

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
