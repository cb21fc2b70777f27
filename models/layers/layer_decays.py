"""Decays that depend on the layer: the fixed slopes of lightning attention, and lower bounds of forget gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RULES = ("geometric", "arithmetic")


class Slopes:
    """The rates at which heads forget, `[H]`, never negative: head h = 0 … H - 1 decays by exp(-slope_h) a token.

        geometric     slope_h = 2^(-8 (h + 1) / H) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
        arithmetic    slope_h = 8 h / H * (1 - layer / depth)

    Geometric is the rule of MiniMax-01's code, and to 1e-5 of that of TransNormerLLM, where the number of heads is a
    power of two; arithmetic is that of TransNormerLLM's paper (Qin et al., 2023, arXiv 2307.14995), which
    flash-linear-attention follows. `layer` counts from 0 over the whole model: later layers forget more slowly.
    Called with a tensor, slopes are on its device, in float32 or, for float64, float64. They are computed, for a cast
    would spoil a buffer. Raises ValueError for an unknown rule.
    """

    def __init__(self, rule: str, heads: int, layer: int, depth: int) -> None:
        if rule not in RULES:
            raise ValueError(f"slope_rule must be one of {', '.join(RULES)}; got {rule!r}. Choose one")
        self.rule, self.heads = rule, heads
        geometric = rule == "geometric"
        self.layer_factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5 if geometric else 1 - layer / depth

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        head = torch.arange(self.heads, device=x.device, dtype=dtype)
        if self.rule == "geometric":
            return torch.exp2((head + 1) * (-8 / self.heads)) * self.layer_factor
        return head * (8 / self.heads * self.layer_factor)


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


def bounded(raw: Tensor, bounds: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
    """(log f, 1 - f) of the forget gates f = bound + (1 - bound) sigmoid(raw), in the type of both together.

    raw `[..., channels]`, bounds `[layers, channels]` within 0 … 1, or None for 0. Neither a closed gate nor a bound of
    0 makes an infinite logarithm or a gradient that is not a number.
    """
    log_closed = F.logsigmoid(-raw)
    if bounds is None:
        return F.logsigmoid(raw), log_closed.exp()
    bound = bounds[layer]
    least = torch.finfo(bound.dtype).tiny  # in place of 0, whose logarithm has no gradient
    log_forget = torch.logaddexp(F.logsigmoid(raw), bound.clamp(min=least).log() + log_closed)
    return log_forget, (1 - bound) * log_closed.exp()
