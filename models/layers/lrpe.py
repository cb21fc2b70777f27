"""LRPE, the linearised relative positional encoding of TransNormerLLM."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...parallel.sequence import Sequence


class LRPE(nn.Module):
    """[x cos(theta t), x sin(theta t)] for a token at position t, of each of `parts`, such as queries and keys:
    `[B, T, H, K]` to `[B, T, H, 2 K]` in the same type.

    So products of a query at i and a key at j are weighted by cos(theta (i - j)) (Qin et al., 2023, arXiv 2307.09270).
    The learned theta `[G, K]`, for groups of heads, starts at 10000^(-2 n / (G K)) for the n-th channel of them all.
    """

    in_float32 = no_weight_decay = ("theta",)  # an angle is theta times a position

    def __init__(self, groups: int, dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(groups, dim))

    def forward(self, parts: tuple[Tensor, ...], seq: Sequence) -> tuple[Tensor, ...]:
        wide, device, theta = torch.promote_types(parts[0].dtype, torch.float32), parts[0].device, self.theta.double()
        # In float64 first: at a million tokens a float32 product is off by a thirtieth of a radian. Where a row goes on
        # with a document, the gradient is that of positions counted from the row's start: it is the same, since only
        # differences of positions count, and its sums over the tokens of a rank stay small.
        position = seq.positions(device)[..., None, None].double()
        in_row = seq.shard(torch.arange(seq.layout.length, device=device).unsqueeze(0))[..., None, None]
        before = (position - in_row).clamp(min=0)
        angle = (position - before) * theta + before * theta.detach()
        angle = angle.remainder(2 * math.pi).to(wide).unsqueeze(3)
        cos, sin = angle.cos(), angle.sin()
        grouped = [x.unflatten(2, (len(self.theta), -1)) for x in parts]
        return tuple(torch.cat([x * cos, x * sin], dim=-1).flatten(2, 3).to(x.dtype) for x in grouped)

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        number = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        tensor.copy_(10000 ** (-2 * number / tensor.numel()))
        return True
