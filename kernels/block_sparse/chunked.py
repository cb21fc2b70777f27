"""Block-sparse attention by blocks: each block meets all the queries that list it in a few matrix products.

A few queries, as in decoding, rather gather the keys that they list, and meet them in one product; so do all queries,
some at a time, where blocks are single tokens or little more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..attend import Gradient, merge_weight
from ..blocks import BlockTile
from ..dispatch import at_a_time
from .visits import Group, Visits, add_to_listed, listed_keys, visits_of

SCORES = 1 << 17  # of one product: they stay in cache between the passes over them
KEYS = 512
COPIED = 32  # queries from which on it pays to copy all keys head by head
FEW = 2  # queries up to which each gathers its own keys
GATHERED = 4  # tokens of a block below which all do
NUMBERS = 1 << 22  # of the keys and values gathered at a time on a CPU, see `at_a_time`


class _Problem:
    """The tensors in the order in which rows are gathered: heads of a list together, keys of a head together."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tile: BlockTile, scale: float) -> None:
        self.tile, self.scale = tile, scale
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim, self.list_heads = v.shape[3], blocks.shape[2]
        self.heads_per_list = self.heads // self.list_heads
        self.q = self.rows(q).mul_(scale) if q.dtype != self.dtype else self.rows(q) * scale
        self.k, self.v = (x.to(self.dtype).transpose(1, 2) for x in (k, v))
        if self.length >= COPIED:
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        self.visits: Visits = visits_of(blocks, tile, k.shape[2])
        self.positions = tile.queries.positions(q.device).long()

    def rows(self, x: Tensor) -> Tensor:
        """`[B, T, H, X]` (or `[B, T, H]`) to `[B·J·T, R·X]`, J heads with lists and R heads per list."""
        x = x.to(self.dtype).reshape(self.batch, self.length, self.list_heads, -1)
        return x.transpose(1, 2).flatten(0, 2)

    def tokens(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, with the heads apart: `[B, T, H, X]`."""
        x = rows.view(self.batch, self.list_heads, self.length, self.heads_per_list, -1)
        return x.transpose(1, 2).flatten(2, 3)

    def zeros(self, dim: int) -> Tensor:
        return self.q.new_zeros(self.q.shape[0], self.heads_per_list * dim)

    def key_tiles(self, group: Group) -> Iterator[tuple[int, int]]:
        """A group's keys, by (offset, length)."""
        for offset in range(0, group.length, KEYS):
            yield offset, min(KEYS, group.length - offset)

    def query_tiles(self, group: Group) -> Iterator[Tensor]:
        """A group's rows, as many at once as give `SCORES` scores against a tile of keys."""
        step = max(1, SCORES // (min(group.length, KEYS) * self.heads_per_list))
        for first in range(group.first, group.last, step):
            yield self.visits.rows[first : min(first + step, group.last)]

    def hidden(self, group: Group, rows: Tensor, offset: int, length: int) -> Tensor | None:
        """bool `[rows, 1, length]` for a group that does not see its keys whole."""
        if group.full:
            return None
        query = self.positions[group.row].index_select(0, rows % self.length)
        key = torch.arange(length, device=rows.device) + (group.position + offset)
        return ~self.tile.mask.visible(query, key).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float) -> tuple[Tensor, Tensor]:
    """See `longreach.kernels.block_sparse.attend`. Blocks merge into (out, lse) in the order of their ids."""
    if k.shape[1] and (q.shape[1] <= FEW or tile.layout.block_size < GATHERED):
        return _attend_gathered(q, k, v, blocks, tile, scale)
    inside = _Problem(q, k, v, blocks, tile, scale)
    out, lse = inside.zeros(inside.value_dim), inside.zeros(1).fill_(float("-inf"))
    for group in inside.visits.groups:
        for offset, width in inside.key_tiles(group):
            keys = slice(group.start + offset, group.start + offset + width)
            for rows in inside.query_tiles(group):
                hidden = inside.hidden(group, rows, offset, width)
                if hidden is not None and bool(hidden.all()):
                    continue
                _merge(inside, (out, lse), rows, inside.k[group.row, group.group, keys],
                       inside.v[group.row, group.group, keys], hidden)  # fmt: skip
    return inside.tokens(out), inside.tokens(lse).squeeze(-1)


def _attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tile: BlockTile, scale: float
) -> tuple[Tensor, Tensor]:
    """Every query against the keys of its own list, some of which are hidden."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_empty(*q.shape[:3], 1, dtype=dtype)
    for at, own, visible in _gathered(k, v, blocks, tile):
        k_here, v_here = _listed(k, v, own, dtype)
        scores = _gathered_scores(q[:, at].to(dtype), k_here, visible, scale)
        lse_here = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse_here.clamp(min=-1e30)).exp_()  # of a query that sees no key, exp(−inf) = 0
        out[:, at], lse[:, at] = (weights @ v_here).flatten(2, 3), lse_here.flatten(2, 3)
    return out, lse.squeeze(-1)


def _gathered(
    k: Tensor, v: Tensor, blocks: Tensor, tile: BlockTile
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Some queries at a time: (which, the index of their keys, `[B, C, J, N]`, and which of these are visible)."""
    lists, device = blocks.shape[2], k.device
    each = len(blocks) * lists * blocks.shape[3] * tile.layout.block_size * (k.shape[3] + v.shape[3])
    step = max(1, at_a_time(NUMBERS, device) // max(each, 1))
    row = torch.arange(k.shape[0], device=device).view(-1, 1, 1, 1)
    group = torch.arange(lists, device=device).view(-1, 1) // (lists // k.shape[2])
    for low in range(0, tile.queries.length, step):
        high = min(low + step, tile.queries.length)
        keys, visible = listed_keys(blocks, tile, k.shape[1], low, high)
        yield slice(low, high), (row, keys, group), visible


def _listed(k: Tensor, v: Tensor, own: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys `[B, C, J, N, K]` and values at the index `own`. Values that are the last dims of keys, as those of
    latents are, are not gathered again."""
    keys = k[own].to(dtype)
    if v.shape[3] <= k.shape[3] and v.is_set_to(k[..., k.shape[3] - v.shape[3] :]):
        return keys, keys[..., k.shape[3] - v.shape[3] :]
    return keys, v[own].to(dtype)


def _gathered_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`[B, C, J, R, N]` of q `[B, C, H, K]` and k `[B, C, J, N, K]`; −inf where it is not visible."""
    scores = q.unflatten(2, (k.shape[2], -1)) @ k.mT
    return scores.mul_(scale).masked_fill_(~visible.unsqueeze(3), float("-inf"))


def _backward_gathered(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tile: BlockTile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_attend_gathered`; gradients of keys are added up in the order of queries."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    dout, delta, lse = gradient.dout.to(dtype), gradient.delta(dtype), gradient.lse.to(dtype)
    lists = blocks.shape[2]
    for at, own, visible in _gathered(k, v, blocks, tile):
        k_here, v_here = _listed(k, v, own, dtype)
        q_here, dout_here = (x[:, at].to(dtype).unflatten(2, (lists, -1)) for x in (q, dout))  # [B, C, J, R, K]
        delta_here, lse_here = (x[:, at].unflatten(2, (lists, -1)).unsqueeze(-1) for x in (delta, lse))
        scores = _gathered_scores(q[:, at].to(dtype), k_here, visible, scale)
        p = scores.sub_(lse_here.clamp(min=-1e30)).exp_()
        ds = (dout_here @ v_here.mT).sub_(delta_here).mul_(p).mul_(scale)
        dq[:, at] = (ds @ k_here).flatten(2, 3)
        for total, part in ((dk, ds.mT @ q_here), (dv, p.mT @ dout_here)):
            add_to_listed(total, own, part)
    return dq, dk, dv


def _merge(
    inside: _Problem, into: tuple[Tensor, Tensor], rows: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
) -> None:
    """Attention of the rows over a tile of keys, merged into their earlier results."""
    out, lse = into
    scores = inside.q.index_select(0, rows).view(-1, inside.key_dim) @ k.T
    if hidden is not None:
        scores.view(len(rows), -1, len(k)).masked_fill_(hidden, float("-inf"))
    most = scores.amax(-1, keepdim=True)
    if hidden is not None:
        most.clamp_(min=-1e30)  # of a row that sees no key of the tile: its weights are exp(−inf) = 0
    total = scores.sub_(most).exp_().sum(-1, keepdim=True)
    out_tile = (scores @ v).div_(total.clamp(min=1e-30) if hidden is not None else total)
    lse_tile = most.add_(total.log_()).view(len(rows), -1)
    lse_before = lse.index_select(0, rows)
    merged = out.index_select(0, rows)
    weight = merge_weight(lse_before, lse_tile).view(-1, 1)
    merged.view(-1, inside.value_dim).lerp_(out_tile, weight)
    out.index_copy_(0, rows, merged)
    lse.index_copy_(0, rows, torch.logaddexp(lse_before, lse_tile))


def attend_backward(
    gradient: Gradient, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, tile: BlockTile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `longreach.kernels.block_sparse.attend_backward`. A block's dk and dv are summed in the order of queries."""
    if k.shape[1] and tile.layout.block_size < GATHERED:
        return _backward_gathered(gradient, q, k, v, blocks, tile, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    inside = _Problem(q, k, v, blocks, tile, scale)
    dout, delta, lse = (inside.rows(x) for x in (gradient.dout.to(dtype), gradient.delta(dtype), gradient.lse))
    dq, dk, dv = inside.zeros(inside.key_dim), torch.zeros_like(inside.k), torch.zeros_like(inside.v)
    for group in inside.visits.groups:
        for offset, width in inside.key_tiles(group):
            keys = slice(group.start + offset, group.start + offset + width)
            k_tile, v_tile, dk_tile, dv_tile = (x[group.row, group.group, keys] for x in (inside.k, inside.v, dk, dv))
            for rows in inside.query_tiles(group):
                hidden = inside.hidden(group, rows, offset, width)
                if hidden is not None and bool(hidden.all()):
                    continue
                q_rows = inside.q.index_select(0, rows).view(-1, inside.key_dim)
                dout_rows = dout.index_select(0, rows).view(-1, inside.value_dim)
                lse_rows, delta_rows = (x.index_select(0, rows).view(-1, 1) for x in (lse, delta))
                p = torch.addmm(lse_rows, q_rows, k_tile.T, beta=-1)
                if hidden is not None:
                    p.view(len(rows), -1, width).masked_fill_(hidden, float("-inf"))
                p.exp_()
                dv_tile.addmm_(p.T, dout_rows)
                ds = torch.addmm(delta_rows, dout_rows, v_tile.T, beta=-1).mul_(p)
                dk_tile.addmm_(ds.T, q_rows)
                # The rows of a tile are distinct, so that the sum has one order.
                dq.index_add_(0, rows, (ds @ k_tile).view(len(rows), -1))
    return inside.tokens(dq.mul_(scale)), dk.transpose(1, 2), dv.transpose(1, 2)
