"""Selection by tiles: a few queries against a few windows at a time, and the best blocks so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import at_a_time
from .choices import Choices
from .rule import Rule

SCORES = 1 << 20  # window scores at a time on a CPU, see `at_a_time`
BLOCKS = 512  # blocks whose scores are computed at a time, or more:
LISTS = 2  # times as many as a list holds, since the best so far are sorted again each time


class _Queries(NamedTuple):
    """Queries of one document against its windows: `q` `[G, R·C, K]`, C tokens at positions from `position` on.

    `seen` `[C]` is the last window that each of them sees, −1 or less for none, and `seen_first` that of the first, on
    the host. lse, weights: `[G, R·C, 1]`.
    """

    q: Tensor
    summaries: Tensor
    position: int
    tokens: int
    scale: float
    seen: Tensor
    seen_first: int
    lse: Tensor | None
    weights: Tensor | None


def select(
    q: Tensor,
    summaries: Tensor,
    *,
    rule: Rule,
    choices: Choices,
    scale: float,
    lse: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """See `longreach.kernels.select_blocks`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    windows, layout = choices.windows, choices.layout
    batch, length, heads, _ = q.shape
    groups = summaries.shape[2]
    at_once = max(BLOCKS, LISTS * rule.count)
    lists = q.new_full((batch, length, groups if rule.pooled else heads, rule.count), -1, dtype=torch.int32)
    for row, runs in enumerate(choices.queries.runs):
        by_group = summaries[row].to(dtype).transpose(0, 1).contiguous()
        for run in runs:
            if run.is_padding:
                continue
            first = windows.first[row][run.document]
            most = max(1, min(windows.number(run.end_position), at_once * rule.windows_per_block))
            step = min(512, max(16, at_a_time(SCORES, q.device) // (heads * most)))
            for offset in range(0, run.length, step):
                tokens = min(step, run.length - offset)
                position, at = run.position + offset, slice(run.start + offset, run.start + offset + tokens)
                seen_summaries = by_group[:, first : first + windows.number(position + tokens)]
                grouped = q[row, at].to(dtype).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
                normaliser, factor = (
                    None if x is None else x[row, at].to(dtype).T.reshape(groups, -1, 1) for x in (lse, weights)
                )
                positions = torch.arange(position, position + tokens, device=q.device)
                seen = torch.div(positions + 1 - windows.size, windows.stride, rounding_mode="floor")
                seen_first = (position + 1 - windows.size) // windows.stride
                queries = _Queries(
                    grouped, seen_summaries, position, tokens, scale, seen, seen_first, normaliser, factor
                )
                chosen = _choose(queries, rule, at_once)
                in_row = chosen + layout.first[row][run.document]
                lists[row, at] = torch.where(chosen < 0, chosen, in_row).transpose(0, 1).int()
    return lists


def _choose(queries: _Queries, rule: Rule, at_once: int) -> Tensor:
    """Blocks of the document `[J, C, count]`, ascending, then −1; of so many at once the scores are computed."""
    if rule.score == "softmax" and queries.lse is None:
        queries = queries._replace(lse=_normaliser(queries, rule))
    heads = queries.q.shape[0] * (1 if rule.pooled else queries.q.shape[1] // queries.tokens)
    best = queries.q.new_empty(heads, queries.tokens, 0)
    ids = best.long()
    last = (queries.position + queries.tokens - 1) // rule.block_size
    for low in range(0, last + 1, at_once):
        high = min(low + at_once, last + 1)
        scores = _block_scores(queries, rule, low, high)
        names = torch.arange(low, high, device=scores.device).expand(scores.shape)
        # Earlier blocks stand first, and those kept are in order of their ids where scores are equal.
        order = torch.cat([best, scores], dim=-1).sort(dim=-1, descending=True, stable=True)
        best = order.values[..., : rule.count]
        ids = torch.cat([ids, names], dim=-1).gather(-1, order.indices[..., : rule.count])
    none = last + 1
    ids = ids.masked_fill(best == float("-inf"), none).sort(-1).values
    ids = ids.masked_fill_(ids == none, -1)
    return torch.nn.functional.pad(ids, (0, rule.count - ids.shape[-1]), value=-1)


def _normaliser(queries: _Queries, rule: Rule) -> Tensor:
    """Log-sum-exp over all windows seen, `[G, R·C, 1]`."""
    lse = queries.q.new_full((*queries.q.shape[:2], 1), float("-inf"))
    step = BLOCKS * rule.windows_per_block
    for low in range(0, queries.summaries.shape[1], step):
        high = min(low + step, queries.summaries.shape[1])
        scores = _window_scores(queries, low, high, float("-inf"))
        lse = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
    return lse


def _window_scores(queries: _Queries, low: int, high: int, unseen: float) -> Tensor:
    """scale q · summary for windows low..high, `[G, R·C, high − low]`."""
    scores = (queries.q @ queries.summaries[:, low:high].mT).mul_(queries.scale)
    if queries.weights is not None:
        scores = scores.relu_().mul_(queries.weights)
    if high - 1 > queries.seen_first:
        hidden = torch.arange(low, high, device=scores.device) > queries.seen.unsqueeze(1)
        scores.unflatten(1, (-1, queries.tokens)).masked_fill_(hidden, unseen)
    return scores


def _block_scores(queries: _Queries, rule: Rule, low: int, high: int) -> Tensor:
    """Scores of the document's blocks low..high, `[J, C, high − low]`: +inf if forced, −inf if not to be listed."""
    per, lead = rule.windows_per_block, rule.lead
    first, last = low * per - lead, high * per
    begin, end = max(first, 0), max(0, min(last, queries.summaries.shape[1]))
    begin = min(begin, end)
    scores = _window_scores(queries, begin, end, float("-inf") if rule.score == "softmax" else 0.0)
    if rule.score == "softmax":
        assert queries.lse is not None
        # A query that sees no window has lse −inf; its scores, all hidden, are to be 0.
        scores = scores.sub_(queries.lse.clamp(min=-1e30)).exp_()
    scores = scores.unflatten(1, (-1, queries.tokens))
    scores = scores.sum(1) if rule.pooled else scores.flatten(0, 1)
    blocks = torch.arange(low, high, device=scores.device)
    seen = queries.seen.unsqueeze(1)
    if rule.aggregate == "max" and rule.windows_per_block + lead > 1:
        hidden = torch.arange(begin, end, device=scores.device) > seen
        scores = scores.masked_fill(hidden, float("-inf"))
    fill = 0.0 if rule.aggregate == "sum" else float("-inf")
    scores = torch.nn.functional.pad(scores, (begin - first, last - max(end, begin)), value=fill)
    total: Tensor | None = None
    if not lead and rule.aggregate == "max":
        total = scores.unflatten(-1, (-1, per)).amax(-1)
    for at, weight in enumerate(rule.weights if total is None else ()):
        part = scores[..., at : at + (high - low - 1) * per + 1 : per]
        if rule.aggregate == "max":
            total = part if total is None else torch.maximum(total, part)
        else:
            total = part * weight if total is None else total.add(part, alpha=weight)
    assert total is not None
    positions = torch.arange(queries.position, queries.position + queries.tokens, device=scores.device)
    own = (positions // rule.block_size).unsqueeze(1)
    total = total.masked_fill((blocks * per - lead).clamp(min=0) > seen, float("-inf"))
    forced = ((blocks < rule.initial) | (blocks > own - rule.local)) & (blocks <= own)
    return total.masked_fill_(forced, float("inf")).masked_fill_(blocks > own, float("-inf"))
