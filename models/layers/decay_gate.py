"""Decay gates: the forget gate of Mamba's descendants, and projections whose bias is not rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DecayGate(nn.Module):
    """log decay = -exp(A_log) softplus(x + dt_bias), in float32 at least: never positive.

    `[B, T, heads * channels]` to `[B, T, heads, channels]`, or to `[B, T, heads]` for channels=1. Rates exp(A_log), one
    a head, start uniform within `rates`; dt_bias such that softplus(dt_bias) is log-uniform within 0.001 … 0.1. As in
    Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060).

    With a lower_bound, log decay = lower_bound * sigmoid(exp(A_log) (x + dt_bias)), and rates start at 1: the bounded
    form of Kimi Delta Attention. Raises ValueError for one that is not negative.
    """

    in_float32 = ("A_log", "dt_bias")

    def __init__(
        self,
        heads: int,
        channels: int = 1,
        rates: tuple[float, float] = (0.01, 16.0),
        lower_bound: float | None = None,
    ) -> None:
        super().__init__()
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound must be negative, the logarithm of a decay; got {lower_bound}. Use -5.0")
        self.heads, self.channels, self.rates, self.lower_bound = heads, channels, rates, lower_bound
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of it over many tokens are exponents
        raw, rate = x.to(wide) + self.dt_bias.to(wide), self.A_log.to(wide).exp()
        if self.channels > 1:
            raw, rate = raw.unflatten(-1, (self.heads, self.channels)), rate[:, None]
        if self.lower_bound is None:
            return -rate * F.softplus(raw)
        return self.lower_bound * torch.sigmoid(rate * raw)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        if name == "dt_bias":
            fill_with_steps(tensor, generator)
        elif self.lower_bound is None:
            tensor.uniform_(*self.rates, generator=generator).log_()
        else:
            tensor.zero_()
        return True


class GateLinear(nn.Linear):
    """W x + bias, the bias added in float32 at least: for gates whose values are exponents, or become them.

    `[..., in_features]` to `[..., out_features]` in float32, or float64 for float64.
    """

    in_float32 = ("bias",)

    def forward(self, x: Tensor) -> Tensor:
        raw = F.linear(x, self.weight)
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))  # sums of it over many tokens are exponents
        return wide if self.bias is None else wide + self.bias


class WideLinear(GateLinear):
    """W x + bias in float32 at least, the product too: for what many small errors add up in, such as sums of angles, or
    the queries and keys of linear systems. A product in float32 takes longer than one in bfloat16.

    `[..., in_features]` to `[..., out_features]` in float32, or float64 for float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        product = F.linear(x.to(wide), self.weight.to(wide))
        return product if self.bias is None else product + self.bias


def fill_with_steps(
    tensor: Tensor, generator: torch.Generator, bounds: tuple[float, float] = (1e-3, 1e-1), least: float = 0.0
) -> None:
    """Fills a bias so that softplus(bias) is log-uniform within `bounds`, but not below `least`."""
    step = log_uniform(tensor, generator, bounds).clamp_(min=least)
    tensor.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def check_steps(step_range: tuple[float, float]) -> tuple[float, float]:
    """The bounds between which steps start. Raises ValueError unless they are positive and in order."""
    low, high = step_range
    if not 0 < low <= high:
        raise ValueError(f"step_range must be positive and in order; got {(low, high)}. Put the smaller one first")
    return low, high


def log_uniform(tensor: Tensor, generator: torch.Generator, bounds: tuple[float, float]) -> Tensor:
    """Fills a tensor with numbers whose logarithms are uniform within those of `bounds`, and returns it."""
    low, high = (math.log(bound) for bound in bounds)
    return tensor.uniform_(low, high, generator=generator).exp_()
