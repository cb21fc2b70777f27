"""The divergence by parts: some queries against all keys of their document, or against the blocks that they list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..block_sparse.visits import add_to_listed, listed_keys
from ..blocks import BlockLayout, BlockTile
from ..documents import Documents, Run, expanded

if TYPE_CHECKING:
    from . import GateInputs, GateTile

SCORES = 1 << 20  # of a part
KEYS = 2048  # at a time, at least a block
LOW = -1e30


class _Part(NamedTuple):
    """Queries of some rows, and the blocks that they see, n of them.

    place: the rows and queries. maxima `[B, C, G, n]`: m. seen bool `[B, C, G or 1, n]`. gate_k `[B, n, G, D]`, or
    `[B, C, G, n, D]` where each query has blocks of its own. blocks: where these stand in `[B, N]`, a range, or int64
    `[B, C, G, n]`.
    """

    place: tuple[slice, slice]
    maxima: Tensor
    seen: Tensor
    gate_k: Tensor
    blocks: tuple[slice, slice] | Tensor

    @property
    def target(self) -> Tensor:
        """P, `[B, C, G, n]`."""
        m = self.maxima.masked_fill(~self.seen, 0.0)
        return m / m.sum(-1, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)

    def logs(self, inputs: GateInputs, scale: float) -> Tensor:
        """The logarithm of the gate's softmax; −inf where not seen."""
        equation = "bcgd,bngd->bcgn" if self.gate_k.dim() == 4 else "bcgd,bcgnd->bcgn"
        logits = scale * torch.einsum(equation, inputs.gate_q[self.place], self.gate_k)
        logits = logits.masked_fill(~self.seen, float("-inf"))
        return logits - logits.logsumexp(-1, keepdim=True).clamp(min=LOW)


def divergence(
    inputs: GateInputs, k: Tensor, tile: GateTile, scale: float, gate_scale: float, *, whole: bool
) -> Tensor:
    """D, `[B, T, G]`. whole: in as few parts as can be."""
    out = inputs.q.new_zeros(*inputs.q.shape[:2], k.shape[2])
    for part in _parts(inputs, k, tile, scale, whole):
        p, logs = part.target, part.logs(inputs, gate_scale)
        out[part.place] = (torch.xlogy(p, p) - p * logs.masked_fill(~part.seen, 0.0)).sum(-1)
    return out


def backward(
    dout: Tensor, inputs: GateInputs, k: Tensor, tile: GateTile, scale: float, gate_scale: float, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate_q and gate_k: the scores of attention are computed again."""
    dq, dk = torch.zeros_like(inputs.gate_q), inputs.gate_k.new_zeros(inputs.gate_k.shape)
    for part in _parts(inputs, k, tile, scale, whole):
        gradient = (part.logs(inputs, gate_scale).exp() - part.target) * dout[part.place].unsqueeze(-1) * gate_scale
        gate_q = inputs.gate_q[part.place]
        if not isinstance(part.blocks, Tensor):
            dq[part.place] = torch.einsum("bcgn,bngd->bcgd", gradient, part.gate_k)
            dk[part.blocks] += torch.einsum("bcgn,bcgd->bngd", gradient, gate_q)
            continue
        dq[part.place] = torch.einsum("bcgn,bcgnd->bcgd", gradient, part.gate_k)
        row, group = _rows_and_groups(gradient)
        add_to_listed(dk, (row, part.blocks, group), gradient.unsqueeze(-1) * gate_q.unsqueeze(3))
    return dq, dk


def _parts(inputs: GateInputs, k: Tensor, tile: GateTile, scale: float, whole: bool) -> Iterator[_Part]:
    return (_dense if inputs.blocks is None else _listed)(inputs, k, tile, scale, whole)


def _dense(inputs: GateInputs, k: Tensor, tile: GateTile, scale: float, whole: bool) -> Iterator[_Part]:
    size, dtype, heads = tile.block_size, inputs.q.dtype, inputs.q.shape[2]
    keys_of = {(row, run.document): run for row, run in _runs(tile.keys)}
    for row, run in _runs(tile.queries):
        keys, rows = keys_of[row, run.document], slice(row, row + 1)
        first = tile.windows.first[row].get(run.document, 0)
        width = max(size, KEYS // size * size) if not whole else keys.length + size - keys.length % size
        step = run.length if whole else min(256, max(16, SCORES // (heads * (width + run.end_position // size))))
        for low in range(0, run.length, step):
            high = min(low + step, run.length)
            place = rows, slice(run.start + low, run.start + high)
            at = torch.arange(run.position + low, run.position + high, device=k.device)
            count = (run.position + high) // size  # complete blocks that the last query sees
            if not count:
                continue
            q = inputs.q[place].unflatten(2, (k.shape[2], -1))
            lse, maxima = q.new_full(q.shape[:-1], float("-inf")), []
            for begin in range(0, run.position + high, width):
                end = min(begin + width, run.position + high)
                scores = scale * torch.einsum(
                    "bcgrk,bsgk->bcgrs", q, k[rows, keys.start + begin : keys.start + end].to(dtype)
                )
                hidden = torch.arange(begin, end, device=k.device) > at.unsqueeze(1)
                scores.masked_fill_(hidden[None, :, None, None], float("-inf"))
                lse = torch.logaddexp(lse, scores.logsumexp(-1))
                if (inside := min(end, count * size) - begin) > 0:
                    maxima.append(scores[..., :inside].unflatten(-1, (-1, size)).amax(-1))
            m = (torch.cat(maxima, dim=-1) - lse.unsqueeze(-1)).exp().amax(3)
            seen = (torch.arange(count, device=k.device) + 1) * size <= at.unsqueeze(1) + 1
            blocks = rows, slice(first, first + count)
            yield _Part(place, m, seen[None, :, None], inputs.gate_k[blocks], blocks)


def _runs(documents: Documents) -> list[tuple[int, Run]]:
    """Runs of tokens, of all rows, each with its row."""
    return [(row, run) for row, runs in enumerate(documents.runs) for run in runs if not run.is_padding]


def _listed(inputs: GateInputs, k: Tensor, tile: GateTile, scale: float, whole: bool) -> Iterator[_Part]:
    assert inputs.blocks is not None
    size, dtype, (batch, length, groups, number) = tile.block_size, inputs.q.dtype, inputs.blocks.shape
    if not inputs.gate_k.shape[1]:
        return
    block_tile = tile.derive(_block_tile)
    step = length if whole else max(1, 8 * SCORES // max(1, batch * groups * number * size * k.shape[3]))
    windows = tile.on(k.device, _windows_of_blocks)
    for low in range(0, length, step):
        high = min(low + step, length)
        place = slice(None), slice(low, high)
        keys, seen = listed_keys(inputs.blocks, block_tile, k.shape[1], low, high)  # [B, C, G, M * size]
        row, group = _rows_and_groups(keys)
        q = inputs.q[place].unflatten(2, (groups, -1))
        scores = scale * (q @ k[row, keys, group].to(dtype).mT)
        scores.masked_fill_(~seen.unsqueeze(3), float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True).clamp(min=LOW)
        m = (scores - lse).unflatten(-1, (number, size)).amax(-1).exp().amax(3)
        ids = inputs.blocks[place].long().clamp(min=0)
        blocks = windows[row.expand_as(ids), ids]
        complete = seen.unflatten(-1, (number, size)).all(-1) & (blocks >= 0)
        blocks = blocks.clamp(min=0)
        yield _Part(place, m, complete, inputs.gate_k[row.expand_as(ids), blocks, group.expand_as(ids)], blocks)


def _rows_and_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the first and the third dim of x, `[B, C, G, n]`, which broadcast."""
    row = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    return row, torch.arange(x.shape[2], device=x.device).view(-1, 1)


def _block_tile(tile: GateTile) -> BlockTile:
    return BlockTile(tile.keys.derive(BlockLayout, tile.block_size), tile.queries, tile.keys)


def _windows_of_blocks(tile: GateTile) -> Tensor:
    """int64 `[B, max(count, 1)]`: the number of each block among the complete ones of its row; −1 for others."""
    layout, windows = tile.keys.derive(BlockLayout, tile.block_size), tile.windows
    (each, first), (complete, first_complete) = layout.stretches, windows.stretches
    owner, place = expanded(each)
    table = torch.full((tile.keys.batch, max(layout.count, 1)), -1)
    row = layout.documents.columns.row[owner]
    table[row, first[owner] + place] = torch.where(place < complete[owner], first_complete[owner] + place, -1)
    return table
