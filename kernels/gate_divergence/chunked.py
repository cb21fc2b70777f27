"""The divergence by parts: some queries against some blocks of their document, or against those that they list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..attend import merge
from ..block_sparse.visits import add_to_listed, listed_keys
from ..blocks import BlockLayout, BlockTile
from ..documents import expanded
from ..windows import WindowLayout

if TYPE_CHECKING:
    from . import GateInputs, ListedGateInputs
    from .tiles import GateTile

SCORES = 1 << 20  # of a part
KEYS = 2048  # at a time, at least a block
LOW = -1e30


class Part(NamedTuple):
    """Queries of some rows against n blocks.

    place: the rows and queries. maxima, logits `[B, C, G, n]`: log m and the gate's logits, both −inf where a block is
    not seen. gate_k `[B, n, G, D]`, or `[B, C, G, n, D]` where each query has blocks of its own. blocks: where these
    stand in `[B, N]`, a range, or int64 `[B, C, G, n]`.
    """

    place: tuple[slice, slice]
    maxima: Tensor
    logits: Tensor
    gate_k: Tensor
    blocks: tuple[slice, slice] | Tensor


def divergence(parts: Iterable[Part], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the parts to (out `[B, T, 2 G, 1]`, log-sum-exp `[B, T, 2 G]`), which are returned."""
    for place, maxima, logits, *_ in parts:
        mass = torch.cat([maxima, logits], dim=2).logsumexp(-1)
        weights = (maxima - mass[:, :, : maxima.shape[2], None].clamp(min=LOW)).exp()
        total = (weights * (maxima - logits).masked_fill(maxima.isneginf(), 0.0)).sum(-1)
        total = torch.cat([total, torch.zeros_like(total)], dim=2).unsqueeze(-1)
        out[place], lse[place] = merge(out[place], lse[place], total, mass)
    return out, lse


def backward(parts: Iterable[Part], dout: Tensor, lse: Tensor, gate_q: Tensor, gate_k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate_q and gate_k, given that of the divergence `[B, T, G]` times the gate's scale, and lse."""
    dq, dk = torch.zeros_like(gate_q), torch.zeros_like(gate_k)
    for part in parts:
        mass, of_gate = lse[part.place].clamp(min=LOW).unsqueeze(-1).chunk(2, dim=2)
        gradient = ((part.logits - of_gate).exp() - (part.maxima - mass).exp()) * dout[part.place].unsqueeze(-1)
        queries = gate_q[part.place]
        if not isinstance(part.blocks, Tensor):
            dq[part.place] += torch.einsum("bcgn,bngd->bcgd", gradient, part.gate_k)
            dk[part.blocks] += torch.einsum("bcgn,bcgd->bngd", gradient, queries)
            continue
        dq[part.place] += torch.einsum("bcgn,bcgnd->bcgd", gradient, part.gate_k)
        row, group = _rows_and_groups(gradient)
        add_to_listed(dk, (row, part.blocks, group), gradient.unsqueeze(-1) * queries.unsqueeze(3))
    return dq, dk


def dense(
    inputs: GateInputs, windows: Tensor, tile: GateTile, scale: float, gate_scale: float, *, whole: bool
) -> Iterator[Part]:
    """All blocks that queries see."""
    size, dtype, (heads, groups) = tile.block_size, inputs.q.dtype, (inputs.q.shape[2], windows.shape[3])
    blocks = max(1, KEYS // size)
    step = max(16, min(256, SCORES // (heads * blocks * size)))
    table = torch.stack([*tile.pieces.queries[2:], *tile.pieces.keys[2:], tile.first, tile.pieces.keys.row], dim=1)
    for start, length, position, at_key, number, block, first_of_row, row in table.tolist():
        rows, first = slice(row, row + 1), first_of_row + block
        lines = length if whole else step
        for low in range(0, length, lines):
            high = min(low + lines, length)
            place = rows, slice(start + low, start + high)
            at = torch.arange(position + low, position + high, device=windows.device)
            seen = min(number, (position + high) // size - block)
            q, lse = inputs.q[place].unflatten(2, (groups, -1)), inputs.lse[place].unflatten(2, (groups, -1))
            for begin in range(0, seen, number if whole else blocks):
                end = min(begin + (number if whole else blocks), seen)
                keys = windows[rows, at_key + begin : at_key + end].flatten(1, 2).to(dtype)
                scores = torch.einsum("bcgrk,bsgk->bcgrs", q, keys).unflatten(-1, (-1, size)).amax(-1).mul_(scale)
                here = rows, slice(first + begin, first + end)
                gate_k = inputs.gate_k[here]
                logits = torch.einsum("bcgd,bngd->bcgn", inputs.gate_q[place], gate_k).mul_(gate_scale)
                ends = torch.arange(block + begin + 1, block + end + 1, device=at.device) * size
                hidden = (ends > at.unsqueeze(1) + 1)[None, :, None]
                maxima = (scores - lse.unsqueeze(-1)).amax(3)
                unseen = float("-inf")
                yield Part(place, maxima.masked_fill(hidden, unseen), logits.masked_fill(hidden, unseen), gate_k, here)


def listed(
    inputs: ListedGateInputs, k: Tensor, tile: BlockTile, scale: float, gate_scale: float, *, whole: bool
) -> Iterator[Part]:
    """The blocks that each query lists."""
    dtype, (batch, length, groups, number), size = inputs.q.dtype, inputs.blocks.shape, tile.layout.block_size
    if not inputs.gate_k.shape[1]:
        return
    keys_of_list = number * size * len(tile.pieces(k.device))
    step = length if whole else max(1, 8 * SCORES // max(1, batch * groups * keys_of_list * k.shape[3]))
    windows = tile.layout.on(k.device, _windows_of_blocks)
    for low in range(0, length, step):
        place = slice(None), slice(low, min(low + step, length))
        keys, seen = listed_keys(inputs.blocks, tile, k.shape[1], low, place[1].stop)  # [B, C, G, M * size]
        row, group = _rows_and_groups(keys)
        q = inputs.q[place].unflatten(2, (groups, -1))
        scores = scale * (q @ k[row, keys, group].to(dtype).mT)
        scores.masked_fill_(~seen.unsqueeze(3), float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True).clamp(min=LOW)
        maxima = (scores - lse).unflatten(-1, (number, -1)).amax(-1).amax(3)
        ids = inputs.blocks[place].long().clamp(min=0)
        blocks = windows[row.expand_as(ids), ids]
        hidden = (seen.unflatten(-1, (number, -1)).sum(-1) < size) | (blocks < 0)
        blocks = blocks.clamp(min=0)
        gate_k = inputs.gate_k[row.expand_as(ids), blocks, group.expand_as(ids)]
        logits = torch.einsum("bcgd,bcgnd->bcgn", inputs.gate_q[place], gate_k).mul_(gate_scale)
        unseen = float("-inf")
        yield Part(place, maxima.masked_fill(hidden, unseen), logits.masked_fill(hidden, unseen), gate_k, blocks)


def _rows_and_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first and the third dim of x, `[B, C, G, n]`, which broadcast."""
    row = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    return row, torch.arange(x.shape[2], device=x.device).view(-1, 1)


def _windows_of_blocks(layout: BlockLayout) -> Tensor:
    """int64 `[B, max(count, 1)]`: the number of each block among the complete ones of its row; −1 for others."""
    windows = layout.documents.derive(WindowLayout, layout.block_size, layout.block_size)
    (each, first), (complete, first_complete) = layout.stretches, windows.stretches
    owner, place = expanded(each)
    table = torch.full((layout.documents.batch, max(layout.count, 1)), -1)
    row = layout.documents.columns.row[owner]
    table[row, first[owner] + place] = torch.where(place < complete[owner], first_complete[owner] + place, -1)
    return table
