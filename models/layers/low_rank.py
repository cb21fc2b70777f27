"""Linear maps of low rank, which many mixers make their decays and gates with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """up(activation(down x)): `[..., width]` to `[..., outputs]` by way of `rank` values; outputs default to the width.

    bias: of `up` alone. up: its class, such as `GateLinear`. zero_start: `down` starts at 0, so that the whole starts
    as its bias alone; else both matrices start as the model's do.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        outputs: int | None = None,
        bias: bool = True,
        up: type[nn.Linear] = nn.Linear,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.activation, self.zero_start = activation, zero_start
        self.up = up(rank, width if outputs is None else outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        return self.up(hidden if self.activation is None else self.activation(hidden))

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name != "down.weight" or not self.zero_start:
            return False
        tensor.zero_()
        return True
