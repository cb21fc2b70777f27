"""Lower bounds of forget gates, which rise from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowerBounds(nn.Module):
    """What the forget gates of each layer never fall below, for all layers of a model at once.

        bound_l = sum of softmax(weight)_j over 0 < j <= l          softmax over the layers; the first layer's is 0

    Returns `[layers, channels]` in float32 at least, each row between 0 and 1 and above the row before. The softmax
    starts uniform. One layer of a model owns the parameters, and publishes the bounds to the others. As in HGRN (Qin et
    al., 2023, arXiv 2311.04823).
    """

    in_float32 = ("weight",)

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, channels))

    def forward(self) -> Tensor:
        shares = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).softmax(0)
        return shares.cumsum(0) - shares[0]

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.zero_()
        return True


def bounded(raw: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(log f, 1 - f) of the forget gates f = bound + (1 - bound) sigmoid(raw), in the type of both together.

    raw `[..., channels]`, bound `[channels]` within 0 … 1. Neither a closed gate nor a bound of 0 makes an infinite
    logarithm or a gradient that is not a number.
    """
    log_closed = F.logsigmoid(-raw)
    least = torch.finfo(bound.dtype).tiny  # in place of 0, whose logarithm has no gradient
    log_forget = torch.logaddexp(F.logsigmoid(raw), bound.clamp(min=least).log() + log_closed)
    return log_forget, (1 - bound) * log_closed.exp()
