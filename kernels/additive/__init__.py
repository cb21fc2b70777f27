"""Additive attention: softmax attention whose logits are sums over the channels of queries and keys, not products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attend import Gradient, MaskedAttend
from ..masks import Mask, Tile
from ..softmax import check_inputs

SLOPE = 0.2
UNSEEN = float("-inf")
SCORES = 1 << 18  # at once on a CPU, which stay in its cache


class AdditiveInputs(NamedTuple):
    """q `[B, T, H, K]`, k `[B, S, G, K]`, v `[B, S, G, V]`, weight `[H, K]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor


@dataclass(frozen=True)
class AdditiveAttend(MaskedAttend):
    """o_i = sum_j softmax_j(s_ij) v_j        s_ij = sum_c w_c tanh(q_ic + k_jc)        j <= i in i's document

    As it is defined, in float32 (float64 for float64): every logit of a tile is held at once, on a CPU those of a few
    queries, and of one channel what leads to it. There is no faster form, since tanh does not factor. Bahdanau et al.,
    2015, arXiv 1409.0473.
    """

    record, mask = AdditiveInputs, Mask()

    def check(self, inputs: AdditiveInputs) -> None:
        """Raises ValueError for shapes that do not fit."""
        check_inputs(inputs.q, inputs.k, inputs.v)
        if inputs.weight.shape != inputs.q.shape[2:]:
            raise ValueError(
                f"weight must be one per head and channel, {list(inputs.q.shape[2:])}; got {list(inputs.weight.shape)}"
            )

    def attend(
        self, inputs: AdditiveInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        q, k, v, weight = _by_query_head(inputs, received)
        hidden, out, lse = _hidden(q, tile), [], []
        for queries, keys in _parts(hidden, q.shape[2]):
            scores = self.scores(q[:, queries], k[:, keys], weight).masked_fill_(hidden[:, :, queries, keys], UNSEEN)
            lse.append(scores.logsumexp(-1))
            p = (scores - lse[-1].unsqueeze(-1)).exp_().masked_fill_(hidden[:, :, queries, keys], 0.0)
            out.append(torch.einsum("bhts,bshv->bthv", p, v[:, keys]))
        return torch.cat(out, dim=1), torch.cat(lse, dim=2).transpose(1, 2)

    def attend_backward(
        self, gradient: Gradient, inputs: AdditiveInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        q, k, v, weight = _by_query_head(inputs, received)
        dout, delta = gradient.dout.to(q.dtype), gradient.delta(q.dtype).transpose(1, 2).unsqueeze(-1)
        lse, hidden = gradient.lse.transpose(1, 2).unsqueeze(-1), _hidden(q, tile)
        dq, dk, dv, dweight = (torch.zeros_like(x) for x in (q, k, v, weight))
        for queries, keys in _parts(hidden, q.shape[2]):
            own = q[:, queries], k[:, keys], weight
            p = (self.scores(*own) - lse[:, :, queries]).exp_().masked_fill_(hidden[:, :, queries, keys], 0.0)
            dv[:, keys] += torch.einsum("bhts,bthv->bshv", p, dout[:, queries])
            ds = torch.einsum("bthv,bshv->bhts", dout[:, queries], v[:, keys])
            of_queries, of_keys, of_weight = self.scores_backward(p * (ds - delta[:, :, queries]), *own)
            dq[:, queries] += of_queries
            dk[:, keys] += of_keys
            dweight += of_weight
        dk, dv = (x.unflatten(2, (received[0].shape[2], -1)).sum(3) for x in (dk, dv))
        return {"q": dq, "weight": dweight}, (dk, dv)

    def scores(self, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        """Logits `[B, H, T, S]` of q `[B, T, H, K]` and k `[B, S, H, K]`."""
        scores = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        for of_query, of_key, of_channel in zip(q.unbind(-1), k.unbind(-1), weight.unbind(-1), strict=True):
            scores += of_channel[:, None, None] * _sums(of_query, of_key).tanh()
        return scores

    def scores_backward(self, ds: Tensor, q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and weight from that of the logits."""
        dq, dk, dweight = torch.empty_like(q), torch.empty_like(k), torch.empty_like(weight)
        for c in range(q.shape[-1]):
            value = _sums(q[..., c], k[..., c]).tanh()
            dweight[:, c] = (ds * value).sum((0, 2, 3))
            dsum = ds * weight[:, c, None, None] * (1 - value.square())
            dq[..., c], dk[..., c] = dsum.sum(3).transpose(1, 2), dsum.sum(2).transpose(1, 2)
        return dq, dk, dweight


@dataclass(frozen=True)
class ConcatenatedAttend(AdditiveAttend):
    """The same with s_ij = LeakyReLU(w . q_i + w . k_j), of slope 0.2 below 0: linear in the two put side by side.

    Velickovic et al., 2018, arXiv 1710.10903. Without the kink all queries would weigh their keys alike.
    """

    def scores(self, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return F.leaky_relu(_sums((q * weight).sum(-1), (k * weight).sum(-1)), SLOPE)

    def scores_backward(self, ds: Tensor, q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = _sums((q * weight).sum(-1), (k * weight).sum(-1))
        dsum = torch.where(sums > 0, ds, SLOPE * ds)
        of_queries, of_keys = (dsum.sum(dim).transpose(1, 2).unsqueeze(-1) for dim in (3, 2))
        dweight = (of_queries * q).sum((0, 1)) + (of_keys * k).sum((0, 1))
        return of_queries * weight, of_keys * weight, dweight


def _by_query_head(inputs: AdditiveInputs, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k, v and weight in float32 or float64, with as many heads of keys as of queries."""
    dtype, repeats = torch.promote_types(inputs.q.dtype, torch.float32), inputs.q.shape[2] // received[0].shape[2]
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in received)
    return inputs.q.to(dtype), k, v, inputs.weight.to(dtype)


def _hidden(q: Tensor, tile: Tile) -> Tensor:
    """bool `[B, 1, T, S]`: where a key is not visible."""
    return ~tile.mask.dense(tile.queries, tile.keys, q.device).unsqueeze(1)


def _parts(hidden: Tensor, heads: int) -> Iterator[tuple[slice, slice]]:
    """Queries, of all at least one part, and the keys between the first and the last that they see."""
    batch, _, length, number = hidden.shape
    if hidden.device.type != "cpu":
        yield slice(0, length), slice(0, number)
        return
    step = max(1, SCORES // max(1, batch * heads * number))
    for low in range(0, max(1, length), step):
        queries = slice(low, min(low + step, length))
        seen = (~hidden[:, :, queries]).flatten(0, 2).any(0).nonzero().flatten().tolist()
        yield queries, slice(seen[0], seen[-1] + 1) if seen else slice(0, 0)


def _sums(of_query: Tensor, of_key: Tensor) -> Tensor:
    """`[B, T, H]` and `[B, S, H]` to the sum of each pair, `[B, H, T, S]`."""
    return of_query.transpose(1, 2).unsqueeze(3) + of_key.transpose(1, 2).unsqueeze(2)


def flops(pairs: int, *, heads: int, key_dim: int, value_dim: int) -> int:
    """Forward FLOPs of so many visible pairs: per channel a sum, a tanh, a product and a sum, and those of values."""
    return pairs * heads * (4 * key_dim + 2 * value_dim)
