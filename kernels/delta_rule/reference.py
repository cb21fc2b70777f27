"""The delta rule as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Problem
from . import DeltaInputs


def forward(problem: Problem[DeltaInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t;  S = 0 before a document's first.

    With beta, a_t = -beta_t e^{g_t} ⊙ e_t and b_t = k_t, e_t = k_t unless it is given, and what is written is beta_t
    v_t; with `erase_first`, a_t lacks e^{g_t}. Of several steps per token the first alone finds a state that decays.
    """
    inputs, heads = problem.inputs, problem.inputs.v.shape[2]
    q_BTHK, k_BTHNK, v_BTHNV = (_wide(x, heads, problem.dtype) for x in (inputs.q, _steps(inputs.k), _steps(inputs.v)))
    decay_BTHNK = _decay(inputs.log_decay, k_BTHNK)
    if inputs.a is None or inputs.b is None:
        e = k_BTHNK if inputs.erase is None else _wide(_steps(inputs.erase), heads, problem.dtype)
        beta = torch.ones_like(v_BTHNV[..., 0]) if inputs.beta is None else inputs.beta.to(problem.dtype)
        beta_BTHN1 = beta.view(*v_BTHNV.shape[:-1], 1)
        met = e if problem.op.erase_first else decay_BTHNK * e
        a_BTHNK, b_BTHNK, v_BTHNV = -beta_BTHN1 * met, k_BTHNK, beta_BTHN1 * v_BTHNV
    else:
        a_BTHNK, b_BTHNK = (_wide(_steps(x), heads, problem.dtype) for x in (inputs.a, inputs.b))

    state_BHKV = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        state_BHKV = problem.only(goes_on_B, state_BHKV)
        for n in range(inputs.steps):
            erased_BHV = torch.einsum("bhk,bhkv->bhv", a_BTHNK[:, t, :, n], state_BHKV)
            state_BHKV = decay_BTHNK[:, t, :, n, :, None] * state_BHKV
            state_BHKV = torch.addcmul(state_BHKV, b_BTHNK[:, t, :, n, :, None], erased_BHV[:, :, None, :])
            state_BHKV = torch.addcmul(state_BHKV, k_BTHNK[:, t, :, n, :, None], v_BTHNV[:, t, :, n, None, :])
        state_BHKV = problem.only(real_B, state_BHKV)
        outputs.append(problem.scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV))
    return torch.stack(outputs, dim=1).to(problem.dtype if problem.exact else inputs.q.dtype), state_BHKV


def _steps(x: Tensor) -> Tensor:
    """`[B, T, H, D]` with the dim of its one step, `[B, T, H, N, D]` as it is."""
    return x if x.dim() == 5 else x.unsqueeze(3)


def _wide(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2).to(dtype)


def _decay(log_decay: Tensor | None, like_BTHNK: Tensor) -> Tensor:
    """e^{g} at each token's first step, else 1."""
    if log_decay is None:
        return torch.ones_like(like_BTHNK)
    decay = log_decay.to(like_BTHNK.dtype).exp()
    first = (decay if log_decay.dim() == 4 else decay[..., None]).unsqueeze(3).expand_as(like_BTHNK[:, :, :, :1])
    return torch.cat([first, torch.ones_like(like_BTHNK[:, :, :, 1:])], dim=3)


def begin(problem: Problem[DeltaInputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`): of zero, and of the identity."""
    v, zero = problem.inputs.v, problem.new_states()
    keys, values = zero.shape[2:]
    padded = torch.cat([v, v.new_zeros(*v.shape[:-1], keys)], dim=-1)
    one = torch.eye(keys, dtype=zero.dtype, device=zero.device).expand(*zero.shape[:2], -1, -1)
    both = replace(problem, inputs=problem.inputs._replace(v=padded), exact=True)
    (out, reads), (state, transition) = (
        x.split([values, keys], dim=-1) for x in forward(both, torch.cat([zero, one], dim=-1))
    )
    return out, transition, state, reads
