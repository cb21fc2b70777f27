"""Log-linear attention as its recurrence, token by token: differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem
from . import LogLinearInputs, over_levels
from .levels import level_between, merge_matrix


def forward(problem: Problem[LogLinearInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state), see `log_linear_attention`; the state is 0 before a document's first token."""
    q_BTGK, k_BTGK, v_BTHV, decay_BTH, weights_BTHL = (x.to(problem.dtype) for x in problem.inputs)
    heads, levels = weights_BTHL.shape[2:]
    q_BTHK, k_BTHK = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q_BTGK, k_BTGK))
    positions_BT = problem.documents.positions(problem.device)
    state_BHLKV = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        before_BHLKV = problem.only(goes_on_B, state_BHLKV)
        position_B = positions_BT[:, t]
        merge_BLL = merge_matrix(level_between(position_B - 1, position_B, levels), levels, problem.dtype)
        transition_BHLL = merge_BLL[:, None] * decay_BTH[:, t, :, None, None].exp()
        written_BHKV = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        own_BHLKV = F.pad(written_BHKV.unsqueeze(2), (0, 0, 0, 0, 0, levels - 1))
        state_BHLKV = problem.only(real_B, over_levels(transition_BHLL, before_BHLKV) + own_BHLKV)
        outputs.append(torch.einsum("bhk,bhl,bhlkv->bhv", q_BTHK[:, t], weights_BTHL[:, t], state_BHLKV))
    out_BTHV = problem.scale * torch.stack(outputs, dim=1)
    return out_BTHV if problem.exact else out_BTHV.to(problem.inputs.q.dtype), state_BHLKV
