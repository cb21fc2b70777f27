"""Slot attention as its recurrence, token by token: differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import SlotInputs


def forward(problem: Problem[SlotInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    out, final, _ = attend(problem, initial_state)
    return out, final


def attend(problem: Problem[SlotInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final state, weights `[B, T, H, M]`), see `slot_attention`; slots are 0 before a document's first token."""
    q_BTHK, k_BTHK, v_BTHV, entering_BTHM, log_decay_BTHM = (x.to(problem.dtype) for x in problem.inputs)
    both_BTHD, size = torch.cat([k_BTHK, v_BTHV], dim=-1), k_BTHK.shape[-1]
    state_BHMD = problem.entering(initial_state)
    outputs, weights = [], []
    for t, goes_on_B, real_B in problem.tokens():
        state_BHMD = log_decay_BTHM[:, t, :, :, None].exp() * problem.only(goes_on_B, state_BHMD)
        state_BHMD = state_BHMD + entering_BTHM[:, t, :, :, None] * both_BTHD[:, t, :, None, :]
        state_BHMD = problem.only(real_B, state_BHMD)
        keys_BHMK, values_BHMV = state_BHMD[..., :size], state_BHMD[..., size:]
        weights.append((problem.scale * torch.einsum("bhk,bhmk->bhm", q_BTHK[:, t], keys_BHMK)).softmax(-1))
        outputs.append(torch.einsum("bhm,bhmv->bhv", weights[-1], values_BHMV))
    out = torch.stack(outputs, dim=1)
    return out if problem.exact else out.to(problem.inputs.q.dtype), state_BHMD, torch.stack(weights, dim=1)


def final_state(problem: Problem[SlotInputs]) -> Tensor:
    """The state after each row's last token, from zero."""
    return forward(problem, None)[1]
