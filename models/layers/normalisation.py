"""Normalisation layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.pointwise import gated_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, in float32 at least (Zhang and Sennrich, 2019, arXiv 1910.07467).

        y = x / sqrt(mean(x^2) + eps) * (offset + weight)

    `[..., width]` to the same shape and dtype. With `offset=1` the weight starts at 0 (Gemma's form). With a gate
    like x, y times its activation, "silu" or "sigmoid". weighted=False leaves the last factor out (SimpleRMSNorm of
    TransNormerLLM, Qin et al., 2023, arXiv 2307.14995); there is no gate then.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0, weighted: bool = True) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset)) if weighted else None

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        if gate is None or self.weight is None:
            assert gate is None
            return rms_norm(x, self.weight, self.eps, self.offset)
        weight = self.weight + self.offset if self.offset else self.weight
        return gated_norm(x, gate, weight, eps=self.eps, activation=activation)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 - self.offset)
        return True


class LayerNorm(nn.Module):
    """Layer norm over the last dim, its statistics in float32 at least (Ba et al., 2016, arXiv 1607.06450).

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    `[..., width]` to the same shape and dtype. bias=False leaves it out.
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 if name == "weight" else 0.0)
        return True


class HeadNorm(nn.Module):
    """Group norm with one group a head: statistics over the value dim, then a weight and a bias for each channel.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    `[B, T, H, V]` to `[B, T, H * V]` in the same dtype; statistics in float32 at least (Wu and He, 2018,
    arXiv 1803.08494). bias=False leaves it out. centred=False makes it the RMS norm: nothing is subtracted, and the
    mean of x^2 stands for the variance. With a gate `[B, T, H * V]`, y times its activation, "silu" or "sigmoid".
    """

    def __init__(
        self, heads: int, value_dim: int, eps: float = 1e-6, bias: bool = True, *, centred: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        self.weight = nn.Parameter(torch.ones(heads * value_dim))
        self.bias = nn.Parameter(torch.zeros(heads * value_dim)) if bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        if gate is not None:
            weight, bias = (None if p is None else p.view(x.shape[-2:]) for p in (self.weight, self.bias))
            assert weight is not None
            gate = gate.unflatten(-1, x.shape[-2:])
            return gated_norm(x, gate, weight, bias, eps=self.eps, activation=activation, centred=self.centred).flatten(
                -2
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = F.layer_norm if self.centred else F.rms_norm
        scaled = norm(wide, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return (scaled if self.bias is None else scaled + self.bias).to(x.dtype)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        tensor.fill_(1.0 if name == "weight" else 0.0)
        return True


NORMS = {
    "rms": RMSNorm,
    "zero_centred_rms": partial(RMSNorm, offset=1.0),
    "unweighted_rms": partial(RMSNorm, weighted=False),
    "layer": LayerNorm,
    "unbiased_layer": partial(LayerNorm, bias=False),
}


def norm_of(kind: str, width: int, eps: float) -> nn.Module:
    """The norm of a block or of a model's end, by the setting `model.norm`. Raises ValueError for an unknown one."""
    if kind not in NORMS:
        raise ValueError(f"model.norm must be one of {', '.join(NORMS)}; got {kind!r}. Choose one")
    return NORMS[kind](width, eps)
