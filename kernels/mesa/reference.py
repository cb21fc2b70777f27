"""Mesa as its recurrence, token by token, with exact solutions: differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import MesaInputs


def forward(problem: Problem[MesaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """out_t = q_t (H_t + diag(regulariser))^{-1} S_t, see `mesa`; (H, S) = 0 before a document's first token."""
    q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, regulariser_HK = (x.to(problem.dtype) for x in problem.inputs)
    values_BTHM = beta_BTH[..., None] * torch.cat([k_BTHK, v_BTHV], dim=-1)
    added_HKK, size = torch.diag_embed(regulariser_HK), k_BTHK.shape[-1]
    state_BHKM = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        before = problem.only(goes_on_B, state_BHKM)
        state_BHKM = decay_BTH[:, t, :, None, None].exp() * before
        state_BHKM = state_BHKM + k_BTHK[:, t, :, :, None] * values_BTHM[:, t, :, None, :]
        state_BHKM = problem.only(real_B, state_BHKM)
        covariance_BHKK, memory_BHKV = state_BHKM[..., :size], state_BHKM[..., size:]
        solved_BHK = torch.linalg.solve((covariance_BHKK + added_HKK).mT, q_BTHK[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", solved_BHK, memory_BHKV))
    out = torch.stack(outputs, dim=1)
    return out if problem.exact else out.to(problem.inputs.q.dtype), state_BHKM


def final_state(problem: Problem[MesaInputs]) -> Tensor:
    """The state after each row's last token, from zero."""
    return forward(problem, None)[1]
