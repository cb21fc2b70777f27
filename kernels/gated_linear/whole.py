"""Kernel attention over whole documents: the public op, and the parts from which `longreach.parallel` makes it
sequence-parallel. What is causal is `gated_linear_attention` with a normaliser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, MaskedAttend, OnOneDevice, documents_of
from ..documents import Documents
from ..masks import Mask, Tile
from ..masks.pattern import Intervals
from ..operation import run
from ..softmax import check_inputs
from .normalise import TINY


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None = None) -> Tensor:
    """Attention of every token to all tokens of its document, in time linear in the length.

        o_i = sum_j (q_i . k_j) v_j / sum_j (q_i . k_j)

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`, G dividing H: features, none of them negative, so that partial
    sums merge by the logarithms of their weights. Where all weights are 0, the output is 0. Returns `[B, T, H, V]` in
    q's type; sums are float32 (float64 for float64). Raises ValueError for shapes that do not fit.

    Katharopoulos et al., 2020, arXiv 2006.16236.
    """
    op, inputs = KernelAttend(), KernelInputs(q, k, v)
    op.check(inputs)
    documents, _ = documents_of(q, k, documents)
    return run(OnOneDevice(op), inputs, (op.tile(documents, documents), "auto"))[0]


class KernelInputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`: features that are not negative."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KernelAttend(MaskedAttend):
    """The op as `longreach.kernels.attend` describes it; its log-sum-exp is the logarithm of the sum of weights."""

    record, mask = KernelInputs, Mask(causal=False)

    def check(self, inputs: KernelInputs) -> None:
        check_inputs(*inputs)

    def kept(self, length: int) -> Intervals:
        raise ValueError(
            "causal must be true to decode; got false. Attention to whole documents has no next token: generate with a "
            "causal mixer"
        )

    def attend(
        self, inputs: KernelInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        sums, out = _Pieces(inputs, received, tile), self.zeros(inputs)[0]
        total = sums.q.new_zeros(sums.q.shape[:-1])
        for queries, q, k, v in sums:
            read = torch.einsum("tgrk,gkv->tgrv", q, torch.einsum("sgk,sgv->gkv", k, v))
            out[queries] += read[..., :-1].flatten(1, 2)
            total[queries] += read[..., -1]
        total = total.flatten(2, 3)
        seen = total > TINY
        out = torch.where(seen.unsqueeze(-1), out / total.clamp(min=TINY).unsqueeze(-1), 0.0)
        return out, torch.where(seen, total.clamp(min=TINY).log(), -torch.inf)

    def attend_backward(
        self, gradient: Gradient, inputs: KernelInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """With Z_i the whole sum of weights of a query: that of the weight q_i . k_j is (dout_i . (v_j - out_i) +
        dlse_i) / Z_i, which is linear in v_j beside a 1."""
        sums = _Pieces(inputs, received, tile)
        inverse = torch.where(gradient.lse.isneginf(), 0.0, (-gradient.lse).exp()).unsqueeze(-1)
        delta = gradient.delta(gradient.exact).unsqueeze(-1)
        dread = torch.cat([gradient.dout.to(gradient.exact), -delta], dim=-1) * inverse
        dread = dread.unflatten(2, sums.q.shape[2:4])
        dq, dk, dv = (torch.zeros_like(x) for x in (sums.q, sums.k, sums.v))
        for (queries, q, k, v), keys in zip(sums, sums.places_of_keys, strict=True):
            dstate = torch.einsum("tgrk,tgrv->gkv", q, dread[queries])
            dq[queries] += torch.einsum("tgrv,gkv->tgrk", dread[queries], torch.einsum("sgk,sgv->gkv", k, v))
            dk[keys] += torch.einsum("sgv,gkv->sgk", v, dstate)
            dv[keys] += torch.einsum("sgk,gkv->sgv", k, dstate)
        return {"q": dq.flatten(2, 3)}, (dk, dv[..., :-1])


class _Pieces:
    """The pieces of a tile one by one: q `[T, G, H / G, K]`, k `[S, G, K]` and v `[S, G, V + 1]`, beside a 1.

    A document that is held in several spans has one for each two of them, whose results add up.
    """

    def __init__(self, inputs: KernelInputs, received: tuple[Tensor, ...], tile: Tile) -> None:
        exact = torch.promote_types(inputs.q.dtype, torch.float32)
        k, v = (x.to(exact) for x in received)
        self.q, self.k = inputs.q.to(exact).unflatten(2, (k.shape[2], -1)), k
        self.v = torch.nn.functional.pad(v, (0, 1), value=1.0)
        self.places_of_queries, self.places_of_keys = (
            [(row, slice(start, start + length)) for row, _, start, length, _ in torch.stack(runs, 1).tolist()]
            for runs in tile.pieces
        )

    def __iter__(self) -> Iterator[tuple[tuple[int, slice], Tensor, Tensor, Tensor]]:
        for queries, keys in zip(self.places_of_queries, self.places_of_keys, strict=True):
            yield queries, self.q[queries], self.k[keys], self.v[keys]


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Floating-point operations of a forward pass: 4 K V per token and head."""
    return 4 * tokens * heads * key_dim * value_dim
