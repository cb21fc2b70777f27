"""Definitions of selection, and of the losses of what learns to select: as `definitions`, document by document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .definitions import Lengths, exactly, joined, numbered, windows_of


def select_blocks(
    q: Tensor,
    summaries: Tensor,
    *,
    lengths: Lengths,
    rule: Any,
    scale: float | None = None,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    if not any(lengths):
        heads = summaries.shape[2] if rule.pooled else q.shape[2]
        return torch.full((*q.shape[:2], heads, rule.count), -1, dtype=torch.int32, device=q.device)
    parts = []
    for row, start, first, scores in _scores_of_documents(q, summaries, lengths, rule, scale, lse, weights):
        parts.append((row, start, _listed(scores, rule, first).transpose(0, 1)))
    return joined(q, parts, -1).int()


def block_scores(
    q: Tensor,
    summaries: Tensor,
    *,
    lengths: Lengths,
    rule: Any,
    scale: float | None = None,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`[B, T, J, blocks]`: inf for blocks that are always listed, and −inf for those that cannot be."""
    parts, total = [], 1 + max(sum(-(-n // rule.block_size) for n in row) for row in lengths)
    for row, start, first, scores in _scores_of_documents(q, summaries, lengths, rule, scale, lse, weights):
        placed = F.pad(_candidates(scores, rule), (first, total - first - scores.shape[-1]), value=-torch.inf)
        parts.append((row, start, placed.transpose(0, 1)))
    if not any(lengths):
        return q.new_full((*q.shape[:3], total), -torch.inf)
    return joined(q, parts, -torch.inf)


def _scores_of_documents(
    q: Tensor,
    summaries: Tensor,
    lengths: Lengths,
    rule: Any,
    scale: float | None,
    lse: Tensor | None,
    weights: Tensor | None,
) -> Iterator[tuple[int, int, int, Tensor]]:
    """(row, first token, id of the first block, scores `[J, T, blocks]`) of every document."""
    q, summaries = exactly(q.detach(), summaries.detach())
    size, stride, block = rule.span, rule.step, rule.block_size
    firsts = [first for *_, first in numbered(lengths, lambda n: windows_of(n, size, stride))]
    of_blocks = numbered(lengths, lambda n: -(-n // block))
    for (row, start, length, first), window in zip(of_blocks, firsts, strict=True):
        count, here = windows_of(length, size, stride), slice(start, start + length)
        known, factors = (None if x is None else x[row, here].to(q.dtype) for x in (lse, weights))
        keys = summaries[row, window : window + count]
        yield row, start, first, _block_scores(q[row, here], keys, rule, scale, known, factors)


def _block_scores(
    q: Tensor, keys: Tensor, rule: Any, scale: float | None, lse: Tensor | None, weights: Tensor | None
) -> Tensor:
    """The score of each block of one document, −inf for a block that no window in the query's view touches."""
    length, count, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    time = torch.arange(length, device=q.device)
    begins = torch.arange(count, device=q.device) * rule.step
    seen = begins[None] + rule.span - 1 <= time[:, None]  # [T, windows]
    scores = factor * torch.einsum("thk,nhk->htn", q, keys.repeat_interleave(group, dim=1))
    if rule.score == "softmax":
        hidden = scores.masked_fill(~seen, -torch.inf)
        total = hidden.logsumexp(-1) if lse is None else lse.transpose(0, 1)
        scores = (hidden - total.masked_fill(total.isneginf(), 0.0).unsqueeze(-1)).exp()
    if weights is not None:
        scores = scores.clamp(min=0.0) * weights.T.unsqueeze(-1)
    scores = scores.masked_fill(~seen, 0.0)
    if rule.pooled:
        scores = scores.unflatten(0, (-1, group)).sum(1)
    columns = []
    for b in range(-(-length // rule.block_size)):
        low, high = b * rule.block_size, (b + 1) * rule.block_size
        shared = ((begins + rule.span).clamp(max=high) - begins.clamp(min=low)).clamp(min=0)
        touching = seen & (shared > 0)
        if rule.aggregate == "sum":
            best = (scores * (shared // rule.step)).sum(-1)
        else:
            best = scores.masked_fill(~touching, -torch.inf).amax(-1) if count else scores.new_zeros(scores.shape[:2])
        columns.append(best.masked_fill(~touching.any(-1), -torch.inf))
    return torch.stack(columns, dim=-1)


def _listed(scores: Tensor, rule: Any, first: int) -> Tensor:
    """Ids of the chosen blocks, ascending, then −1: `[J, T, count]`."""
    heads, length, blocks = scores.shape
    order = _candidates(scores, rule).sort(dim=-1, descending=True, stable=True)
    ids = torch.where(order.values > -torch.inf, order.indices, blocks)[..., : rule.count].sort(-1).values
    ids = torch.cat([ids, ids.new_full((heads, length, max(0, rule.count - ids.shape[-1])), blocks)], dim=-1)
    return torch.where(ids < blocks, ids + first, -1)


def _candidates(scores: Tensor, rule: Any) -> Tensor:
    """Scores `[J, T, blocks]` with inf for blocks that are always listed, and −inf for those after the query's own."""
    number = torch.arange(scores.shape[-1], device=scores.device)
    own = (torch.arange(scores.shape[1], device=scores.device) // rule.block_size)[:, None]
    forced = (number < rule.initial) | (number > own - rule.local)
    return scores.masked_fill(forced, torch.inf).masked_fill(number > own, -torch.inf)


def index_divergence(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    lengths: Lengths,
    block_size: int | None = None,
    scale: float | None = None,
    index_scale: float | None = None,
) -> Tensor:
    q, k, index_q, index_k = exactly(q.detach(), k.detach(), index_q, index_k)
    factor = index_q.shape[-1] ** -0.5 if index_scale is None else index_scale
    parts = []
    for row, start, size, first in numbered(lengths, lambda n: -(-n // (block_size or 1))):
        here = slice(start, start + size)
        logits = factor * torch.einsum("tid,sd->its", index_q[row, here], index_k[row, here, 0])
        if weights is not None:
            positive = logits.clamp(min=0.0) * weights[row, here].to(logits.dtype).T.unsqueeze(-1)
            logits = positive.sum(0, keepdim=True)
        listed = None if block_size is None or blocks is None else blocks[row, here]
        seen = _seen(size, listed, first, block_size or 1, q.device).expand(logits.shape)
        target = _weights(q[row, here], k[row, here], seen, scale).mean(1)
        parts.append((row, start, _divergence(target, logits, seen)))
    return joined(q, parts)


def _seen(size: int, listed: Tensor | None, first: int, block_size: int, device: torch.device) -> Tensor:
    """`[J or 1, T, S]`: which keys of a document a query sees, those of listed blocks `[T, J, M]` if any are given."""
    places = torch.arange(size, device=device)
    seen = (places <= places[:, None]).unsqueeze(0)
    if listed is None:
        return seen
    return seen & (listed.unsqueeze(-1) == first + places // block_size).any(2).transpose(0, 1)


def _weights(q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """`[J, heads, T, S]`: attention's weights of one document, whose heads share J views `[J, T, S]` of the keys."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * torch.einsum("thk,shk->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    scores = scores.unflatten(0, (len(seen), -1)).masked_fill(~seen.unsqueeze(1), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def _divergence(target: Tensor, logits: Tensor, seen: Tensor) -> Tensor:
    """`[T, J]`: KL(target || softmax(logits)) over what is seen; all are `[J, T, S]`."""
    logs = logits.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(target, target) - target * logs).sum(-1).T


def gate_divergence(
    q: Tensor,
    k: Tensor,
    gate_q: Tensor,
    gate_k: Tensor,
    blocks: Tensor | None = None,
    *,
    lengths: Lengths,
    block_size: int,
    scale: float | None = None,
    gate_scale: float | None = None,
) -> Tensor:
    q, k, gate_q, gate_k = exactly(q.detach(), k.detach(), gate_q, gate_k)
    factor = gate_q.shape[-1] ** -0.5 if gate_scale is None else gate_scale
    parts = []
    windows = [first for *_, first in numbered(lengths, lambda n: n // block_size)]
    of_blocks = numbered(lengths, lambda n: -(-n // block_size))
    for (row, start, size, first), window in zip(of_blocks, windows, strict=True):
        here, count = slice(start, start + size), size // block_size
        listed = None if blocks is None else blocks[row, here]
        seen = _seen(size, listed, first, block_size, q.device).expand(k.shape[2], -1, -1)
        pooled = _weights(q[row, here], k[row, here], seen, scale).amax(1)[..., : count * block_size]
        pooled = pooled.unflatten(-1, (count, block_size)).amax(-1)  # [G, T, blocks]
        whole = seen[..., : count * block_size].unflatten(-1, (count, block_size)).all(-1)
        target = pooled.masked_fill(~whole, 0.0)
        target = (target / target.sum(-1, keepdim=True)).nan_to_num(0.0)
        logits = factor * torch.einsum("tgd,bgd->gtb", gate_q[row, here], gate_k[row, window : window + count])
        parts.append((row, start, _divergence(target, logits, whole)))
    return joined(q, parts)
