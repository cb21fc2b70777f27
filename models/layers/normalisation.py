"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.pointwise import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, in float32 at least (Zhang and Sennrich, 2019, arXiv 1910.07467).

        y = x / sqrt(mean(x^2) + eps) * (offset + weight)

    `[..., width]` to the same shape and dtype. With `offset=1` the weight starts at 0 (Gemma's form).
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 - self.offset)
        return True


class HeadNorm(nn.Module):
    """Group norm with one group a head: statistics over the value dim, then a weight and a bias for each channel.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    `[B, T, H, V]` to `[B, T, H * V]` in the same dtype; statistics in float32 at least (Wu and He, 2018,
    arXiv 1803.08494). bias=False leaves it out.
    """

    def __init__(self, heads: int, value_dim: int, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * value_dim))
        self.bias = nn.Parameter(torch.zeros(heads * value_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.layer_norm(wide, x.shape[-1:], eps=self.eps).flatten(-2)
        scaled = normed * self.weight
        return (scaled if self.bias is None else scaled + self.bias).to(x.dtype)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 if name == "weight" else 0.0)
        return True


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim, in float32 at least: what keeps keys of a delta rule at length 1.

    `[..., D]` to the same shape and dtype; a zero vector stays zero, with a finite gradient.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
