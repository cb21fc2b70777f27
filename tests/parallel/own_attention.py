"""An attention op that the project does not have, as a user would write one: a factor per key and a bias per query.

    o_i = sum_j softmax_j(q_i . k_j + b_i c_j) v_j          over the keys of i's document up to i

k and v travel as ever, and with them the factor c of each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longreach.kernels.attend import Attend
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask, Tile


class Inputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, H, K]`, v `[B, S, H, V]`, bias b `[B, T, H]`, factor c `[B, S, H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    factor: Tensor


@dataclass(frozen=True)
class BiasedAttend(Attend):
    record = Inputs
    travels = ("k", "v", "factor")

    def check(self, inputs: Inputs) -> None:
        if inputs.factor.shape != inputs.k.shape[:3]:
            raise ValueError(f"factor must be one per key; got {list(inputs.factor.shape)}")

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        return Mask().tile(queries, keys)

    def kept(self, length: int) -> list[tuple[int, int]]:
        return Mask().kept(length)

    def attend(self, inputs: Inputs, received: tuple[Tensor, ...], tile: Tile, backend: str) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(inputs.q.dtype, torch.float32)
        q, bias, (k, v, factor) = inputs.q.to(dtype), inputs.bias.to(dtype), (x.to(dtype) for x in received)
        scores = torch.einsum("bthk,bshk->bhts", q, k) + torch.einsum("bth,bsh->bhts", bias, factor)
        visible = tile.mask.dense(tile.queries, tile.keys, q.device).unsqueeze(1)
        scores = scores.masked_fill(~visible, -1e30)
        most = scores.detach().amax(-1, keepdim=True)
        weights = (scores - most).exp() * visible
        total = weights.sum(-1)
        out = torch.einsum("bhts,bshv->bthv", weights / total.clamp(min=1e-30).unsqueeze(-1), v)
        lse = torch.where(total > 0, total.clamp(min=1e-30).log() + most.squeeze(-1), float("-inf"))
        return out, lse.transpose(1, 2)
