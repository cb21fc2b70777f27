"""The short convolution as its definition: every tap of every token, where it is of the token's document."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import Documents


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, history: Tensor, activation: str | None
) -> Tensor:
    """out_t = activation(Σ_d weight_{W−1−d} x_{t−d} + bias) over d = 0 … W−1 with d <= position of t; 0 for padding."""
    taps = weight.shape[1]
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows_BSD = torch.cat([history, x], dim=1).to(accumulate)  # S = W − 1 + T
    reach_BT1 = documents.positions(x.device)[..., None]
    out_BTD = torch.zeros(x.shape, dtype=accumulate, device=x.device)
    for back in range(taps):
        earlier_BTD = rows_BSD[:, taps - 1 - back : taps - 1 - back + x.shape[1]]
        seen_BTD = torch.where(reach_BT1 >= back, earlier_BTD, torch.zeros_like(earlier_BTD))
        out_BTD = out_BTD + weight[:, taps - 1 - back].to(accumulate) * seen_BTD
    if bias is not None:
        out_BTD = out_BTD + bias.to(accumulate)
    if activation == "silu":
        out_BTD = F.silu(out_BTD)
    real_BT1 = documents.ids(x.device)[..., None] >= 0
    return torch.where(real_BT1, out_BTD, torch.zeros_like(out_BTD)).to(x.dtype)


def token_shift(x: Tensor, documents: Documents, history: Tensor) -> Tensor:
    """out_t = x_{t−1}, or 0 where t is the first token of its document."""
    earlier_BTD = torch.cat([history, x[:, :-1]], dim=1)
    return torch.where(documents.positions(x.device)[..., None] >= 1, earlier_BTD, torch.zeros_like(earlier_BTD))
