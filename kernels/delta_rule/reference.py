"""The delta rule as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Problem
from . import DeltaInputs


def forward(problem: Problem[DeltaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t;  S = 0 before a document's first.

    With beta, a_t = -beta_t e^{g_t} ⊙ k_t and b_t = k_t, and what is written is beta_t v_t.
    """
    q, k, v, beta, log_decay, a, b = problem.inputs
    q_BTHK, k_BTHK, v_BTHV = (_wide(x, v.shape[2], problem.dtype) for x in (q, k, v))
    decay_BTHK = _decay(log_decay, k_BTHK)
    if a is None or b is None:
        beta_BTH1 = torch.ones_like(v_BTHV[..., :1]) if beta is None else beta.to(problem.dtype)[..., None]
        a_BTHK, b_BTHK, v_BTHV = -beta_BTH1 * decay_BTHK * k_BTHK, k_BTHK, beta_BTH1 * v_BTHV
    else:
        a_BTHK, b_BTHK = (_wide(x, v.shape[2], problem.dtype) for x in (a, b))

    state_BHKV = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        state_BHKV = problem.only(goes_on_B, state_BHKV)
        erased_BHV = torch.einsum("bhk,bhkv->bhv", a_BTHK[:, t], state_BHKV)
        state_BHKV = decay_BTHK[:, t, :, :, None] * state_BHKV
        state_BHKV = torch.addcmul(state_BHKV, b_BTHK[:, t, :, :, None], erased_BHV[:, :, None, :])
        state_BHKV = torch.addcmul(state_BHKV, k_BTHK[:, t, :, :, None], v_BTHV[:, t, :, None, :])
        state_BHKV = problem.only(real_B, state_BHKV)
        outputs.append(problem.scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV))
    return torch.stack(outputs, dim=1).to(problem.dtype if problem.exact else q.dtype), state_BHKV


def _wide(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2).to(dtype)


def _decay(log_decay: Tensor | None, like_BTHK: Tensor) -> Tensor:
    """e^{g} as `[B, T, H, K]`."""
    if log_decay is None:
        return torch.ones_like(like_BTHK)
    decay = log_decay.to(like_BTHK.dtype).exp()
    return (decay if log_decay.dim() == 4 else decay[..., None]).expand_as(like_BTHK)


def begin(problem: Problem[DeltaInputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`): of zero, and of the identity."""
    v, zero = problem.inputs.v, problem.new_states()
    keys, values = zero.shape[2:]
    padded = torch.cat([v, v.new_zeros(*v.shape[:3], keys)], dim=-1)
    one = torch.eye(keys, dtype=zero.dtype, device=zero.device).expand(*zero.shape[:2], -1, -1)
    both = replace(problem, inputs=problem.inputs._replace(v=padded), exact=True)
    (out, reads), (state, transition) = (
        x.split([values, keys], dim=-1) for x in forward(both, torch.cat([zero, one], dim=-1))
    )
    return out, transition, state, reads
