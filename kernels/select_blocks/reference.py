"""Selection as it is defined: every score, every block, one stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import BlockLayout
from ..documents import Documents
from ..windows import WindowLayout
from .choices import Choices
from .rule import Rule


def window_scores(
    q_BTHK: Tensor,
    summaries_BNGK: Tensor,
    rule: Rule,
    documents: Documents,
    windows: WindowLayout,
    scale: float,
    lse_BTH: Tensor | None,
    weights_BTH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of list heads `[B, J, T, N]`, 0 where not seen, and what is seen `[B, 1, T, N]`."""
    dtype, device = torch.promote_types(q_BTHK.dtype, torch.float32), q_BTHK.device
    table_BN3 = windows.table(device)
    last_BN = table_BN3[..., 1] + windows.size - 1
    ids_BT, positions_BT = documents.ids(device), documents.positions(device)
    seen_BTN = (ids_BT.unsqueeze(-1) == table_BN3[:, None, :, 0]) & (ids_BT >= 0).unsqueeze(-1)
    seen_B1TN = (seen_BTN & (last_BN.unsqueeze(1) <= positions_BT.unsqueeze(-1))).unsqueeze(1)
    repeats = q_BTHK.shape[2] // summaries_BNGK.shape[2]
    k_BNHK = summaries_BNGK.to(dtype).repeat_interleave(repeats, dim=2)
    s_BHTN = scale * torch.einsum("bthk,bnhk->bhtn", q_BTHK.to(dtype), k_BNHK)
    if rule.score == "softmax":
        hidden = s_BHTN.masked_fill(~seen_B1TN, float("-inf"))
        lse_BHT1 = hidden.logsumexp(-1, keepdim=True)
        if lse_BTH is not None:
            lse_BHT1 = lse_BTH.to(dtype).transpose(1, 2).unsqueeze(-1)
        s_BHTN = (s_BHTN - lse_BHT1).exp()
    if weights_BTH is not None:
        s_BHTN = s_BHTN.relu() * weights_BTH.to(dtype).transpose(1, 2).unsqueeze(-1)
    s_BHTN = s_BHTN.masked_fill(~seen_B1TN, 0.0)
    if rule.pooled:
        s_BHTN = s_BHTN.unflatten(1, (-1, repeats)).sum(2)
    return s_BHTN, seen_B1TN


def block_scores(
    scores_BJTN: Tensor, seen_B1TN: Tensor, rule: Rule, windows: WindowLayout, layout: BlockLayout
) -> Tensor:
    """`[B, J, T, blocks]`: each block's scores by the tokens it shares with windows; −inf without a seen window."""
    shape = (*scores_BJTN.shape[:3], layout.count)
    result = torch.full(shape, float("-inf"), dtype=scores_BJTN.dtype, device=scores_BJTN.device)
    tables = windows.table().tolist()
    for row in range(scores_BJTN.shape[0]):
        for n, block in enumerate(layout.row(row)):
            total, any_seen = None, None
            for i, (document, position, _) in enumerate(tables[row]):
                block_end = block.position + rule.block_size
                shared = min(position + rule.span, block_end) - max(position, block.position)
                if document != block.document or shared <= 0:
                    continue
                score, seen = scores_BJTN[row, ..., i], seen_B1TN[row, ..., i]
                if rule.aggregate == "sum":
                    score = score * (shared // rule.step)
                    total = score if total is None else total + score
                else:
                    score = score.masked_fill(~seen, float("-inf"))
                    total = score if total is None else torch.maximum(total, score)
                any_seen = seen if any_seen is None else any_seen | seen
            if total is not None and any_seen is not None:
                result[row, ..., n] = total.masked_fill(~any_seen, float("-inf"))
    return result


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
    documents, windows, layout = choices.queries, choices.windows, choices.layout
    scores_BJTN, seen_B1TN = window_scores(q, summaries, rule, documents, windows, scale, lse, weights)
    scores_BJTM = block_scores(scores_BJTN, seen_B1TN, rule, windows, layout)
    own = layout.ids(documents).to(q.device)
    batch, _, length, _ = scores_BJTM.shape
    lists = torch.full((batch, length, scores_BJTM.shape[1], rule.count), -1, dtype=torch.int32, device=q.device)
    for b in range(batch):
        for t in range(length):
            if int(own[b, t]) < 0:
                continue
            document = int(documents.ids()[b, t])
            first, last = layout.first[b][document], int(own[b, t])
            scores_JM = scores_BJTM[b, :, t, first : last + 1].clone()
            scores_JM[:, : rule.initial] = float("inf")
            scores_JM[:, max(0, last + 1 - first - rule.local) :] = float("inf")
            order = scores_JM.sort(dim=-1, descending=True, stable=True)
            for j in range(scores_JM.shape[0]):
                kept = [int(i) for s, i in zip(order.values[j], order.indices[j], strict=True) if s > float("-inf")]
                chosen = sorted(kept[: rule.count])
                lists[b, t, j, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32, device=q.device) + first
    return lists
