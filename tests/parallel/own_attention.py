"""An attention op that the project does not have, and a mixer of it: a factor per key and a bias per query.

    o_i = sum_j softmax_j(q_i . k_j + b_i c_j) v_j          over the keys of i's document up to i

k and v travel as ever, and with them the factor c of each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longreach.kernels import softmax
from longreach.kernels.attend import Attend
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask, Tile
from longreach.models.mixer import Mixer
from longreach.parallel import ops
from longreach.parallel.sequence import Sequence


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


class Biasing(Mixer):
    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.scalars = nn.Linear(width, 3 * width), nn.Linear(width, 2 * heads)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.project(x).chunk(3, dim=-1))
        bias, factor = self.scalars(x).chunk(2, dim=-1)
        return self.output(ops.attention(BiasedAttend, Inputs(q, k, v, bias, factor), seq=seq).flatten(-2))

    def mixing_flops(self, seq: Sequence) -> int:
        return softmax.flops(seq.pairs(Mask()), heads=self.heads, key_dim=8, value_dim=8)
