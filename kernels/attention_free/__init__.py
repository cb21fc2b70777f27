"""AFT-full's operator: softmax over keys channel by channel, with one learned bias per pair of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend import Gradient, MaskedAttend, merge
from ..masks import Mask, Tile
from ..masks.rectangles import rectangles

LIMIT = 512  # queries and keys of a product
RANGE = 900.0  # how many powers of two below the largest key of a product a key counts in full
LOG2 = math.log(2)


class AttentionFreeInputs(NamedTuple):
    """q `[B, T, D, 1]`, of which only shape and type count; k, v `[B, S, D, 1]`; row `[B, T, 1, R]`, column
    `[B, S, 1, R]`: the factors of the bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class AttentionFree(MaskedAttend):
    """o_t = sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts)        w_ts = row_t . column_s

    over the tokens s of t's document up to t, for each of D channels: a head of one channel each. All is computed in
    float64, by products of exp(w) with exp(k) and exp(k) v: no tensor of size T S D is held. Exponentials of keys are
    scaled by powers of two alone, which changes no digit: keys that a query does not see move it by nothing. A key is
    taken to be at least 2^-900 of the largest of its product. AFT-full (Zhai et al., 2021, arXiv 2105.14103).
    """

    record, mask = AttentionFreeInputs, Mask()
    travels = ("k", "v", "column")

    def check(self, inputs: AttentionFreeInputs) -> None:
        """Raises ValueError for shapes that do not fit."""
        q, k, v, row, column = inputs
        if q.dim() != 4 or q.shape[3] != 1 or k.shape != v.shape or k.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"q, k and v must be [B, T, D, 1] and twice [B, S, D, 1]; got {list(q.shape)}, {list(k.shape)} and "
                f"{list(v.shape)}. Make each channel a head"
            )
        if row.shape[:3] != (*q.shape[:2], 1) or column.shape != (*k.shape[:2], 1, row.shape[-1]):
            raise ValueError(
                f"row and column must be [B, T, 1, R] and [B, S, 1, R]; got {list(row.shape)} and "
                f"{list(column.shape)}. Pass one factor per token"
            )

    def attend(
        self, inputs: AttentionFreeInputs, received: tuple[Tensor, ...], tile: Tile, backend: str
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.zeros(inputs)
        for part in _products(inputs.row, received, tile):
            total = part.pairs @ part.weights
            there = part.pairs @ (part.weights * part.v) / total
            exponent = (total.view(torch.int64) >> 52) - 1023
            lse_there = (total * _power(-exponent)).log() + (exponent + part.most_of_keys) * LOG2 + part.most_of_row
            place = part.rows, part.queries
            merged = merge(out[place], lse[place], there.unsqueeze(-1).to(out.dtype), lse_there.to(lse.dtype))
            out[place], lse[place] = merged
        return out, lse

    def attend_backward(
        self,
        gradient: Gradient,
        inputs: AttentionFreeInputs,
        received: tuple[Tensor, ...],
        tile: Tile,
        backend: str,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """With p = exp(k + w − lse), Δ = dout · out − dlse:  dv = Σ_t p dout,  dk = Σ_t p (dout v − Δ), and dw the same
        summed over channels."""
        delta = gradient.delta(torch.float64)
        drow, dk, dv, dcolumn = (torch.zeros_like(x, dtype=torch.float64) for x in (inputs.row, *received))
        for part in _products(inputs.row, received, tile):
            at_queries, at_keys = (part.rows, part.queries), (part.rows, part.keys)
            lse = gradient.lse[at_queries].double()
            exponent = (lse / LOG2).floor()
            share = (part.most_of_row - (lse - exponent * LOG2)).exp() * _power(part.most_of_keys - exponent)
            weighed = share * gradient.dout[at_queries].squeeze(-1).double()
            less = share * delta[at_queries]
            dvalues = part.pairs.mT @ weighed
            dv[at_keys] += (part.weights * dvalues).unsqueeze(-1)
            dk[at_keys] += (part.weights * (part.v * dvalues - part.pairs.mT @ less)).unsqueeze(-1)
            dw = part.pairs * (weighed @ (part.weights * part.v).mT - less @ part.weights.mT)
            drow[at_queries] += (dw @ part.column).unsqueeze(2)
            dcolumn[at_keys] += (dw.mT @ part.row).unsqueeze(2)
        exact = gradient.exact
        return {"row": drow.to(exact)}, (dk.to(exact), dv.to(exact), dcolumn.to(exact))


class _Product(NamedTuple):
    """A rectangle of queries and keys, in float64: t queries, s keys, D channels.

    pairs: exp(w − most_of_row) `[rows, t, s]`, 0 where unseen. weights: exp(k) 2^(−most) `[rows, s, D]`, the most of
    the keys of their document alone; `most_of_keys` is that of each query's document.
    """

    rows: slice
    queries: slice
    keys: slice
    pairs: Tensor
    weights: Tensor
    v: Tensor
    most_of_row: Tensor  # [rows, t, 1]
    most_of_keys: Tensor  # [rows, 1 or t, D]
    row: Tensor
    column: Tensor


def _products(row: Tensor, received: tuple[Tensor, ...], tile: Tile) -> Iterator[_Product]:
    """The parts of a tile, in which every query sees a key."""
    device = row.device
    ids, positions = tile.queries.ids(device), tile.queries.positions(device)
    key_ids, key_positions = tile.keys.ids(device), tile.keys.positions(device)
    for at in rectangles(tile, LIMIT):
        rows, queries, keys = slice(*at.rows), slice(*at.queries), slice(*at.keys)
        k, v = (x[rows, keys].squeeze(-1).double() for x in received[:2])
        row_here, column = row[rows, queries].squeeze(2).double(), received[2][rows, keys].squeeze(2).double()
        seen = ids[rows, queries].unsqueeze(2) == key_ids[rows, keys].unsqueeze(1)
        seen &= positions[rows, queries].unsqueeze(2) >= key_positions[rows, keys].unsqueeze(1)
        bias = (row_here @ column.mT).masked_fill(~seen, -torch.inf)
        exponent = (k / LOG2).floor()
        most_of_row, most = bias.amax(2, keepdim=True), exponent.amax(1, keepdim=True)
        if at.shape == "packed":
            most = _most_of_documents(exponent, key_ids[rows, keys])
        weights = (k - exponent * LOG2).exp() * _power(exponent - most)
        if at.shape == "packed":  # that of the first key that each query sees
            most = most.gather(1, seen.byte().argmax(2, keepdim=True).expand(-1, -1, k.shape[2]))
        yield _Product(rows, queries, keys, (bias - most_of_row).exp(), weights, v, most_of_row, most, row_here, column)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent exactly, for whole numbers; at least 2^-900, and at most 2^900."""
    return ((exponent.clamp(-RANGE, RANGE).long() + 1023) << 52).view(torch.float64)


def _most_of_documents(k: Tensor, ids: Tensor) -> Tensor:
    """The largest of k `[rows, s, D]` over the tokens of each token's document, which stand together."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = (begins.cumsum(1) - 1).unsqueeze(2).expand_as(k)
    return torch.full_like(k, -torch.inf).scatter_reduce_(1, place, k, "amax").gather(1, place)


def flops(pairs: int, *, channels: int, rank: int) -> int:
    """Floating-point operations of a forward pass: 4 D + 2 R for each pair of tokens that see each other."""
    return pairs * (4 * channels + 2 * rank)
