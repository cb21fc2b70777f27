"""Gated linear attention as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .parts import GatedLinearInputs
from .stable import LOWEST


class Steps(NamedTuple):
    """The tensors of a call, as its recurrence reads them: every head its own, `[B, T, H, …]`."""

    q: Tensor  # scaled
    k: Tensor
    v: Tensor  # with a column of ones where there is a normaliser
    decay: Tensor  # [B, T, H, K]
    value_decay: Tensor | None  # [B, T, H, V]
    bonus: Tensor | None  # [H, K]
    log_input: Tensor | None  # [B, T, H]
    log_decay: Tensor | None  # [B, T, H], beside log_input


def forward(problem: Problem[GatedLinearInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = diag(e^{g_t}) S_{t−1} diag(e^{w_t}) + e^{i_t} k_tᵀ v_t, with S = 0 before a document's first token, and

        o_t = scale q_t S_t        or, exclusively,        o_t = scale q_t (S_{t−1} + diag(u) e^{i_t} k_tᵀ v_t)

    as `GatedLinearRecurrence` describes outputs. With an input gate i, what is kept of S is S̃ with S = e^m S̃, and the
    output's last column the log scale that its others have been divided by.
    """
    steps = _steps(problem)
    stabilised = steps.log_input is not None
    state_BHKV, scale_BH = _entering(problem, initial_state, steps)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        keep_B1, real_B1 = goes_on_B[:, None], real_B[:, None]
        state_BHKV = problem.only(goes_on_B, state_BHKV)
        scale_BH = torch.where(keep_B1, scale_BH, LOWEST)
        before_BHKV, before_BH = state_BHKV, scale_BH
        k_BHK1, v_BH1V = steps.k[:, t, :, :, None], steps.v[:, t, :, None, :]
        if steps.log_input is None or steps.log_decay is None:
            state_BHKV = steps.decay[:, t, :, :, None] * state_BHKV
            if steps.value_decay is not None:
                state_BHKV = state_BHKV * steps.value_decay[:, t, :, None, :]
            state_BHKV = torch.addcmul(state_BHKV, k_BHK1, v_BH1V)
        else:
            gate_BH, log_decay_BH = torch.where(real_B1, steps.log_input[:, t], LOWEST), steps.log_decay[:, t]
            scale_BH = torch.maximum(scale_BH + log_decay_BH, gate_BH).detach().clamp(min=LOWEST)
            weight_BH = (log_decay_BH + before_BH - scale_BH).exp()
            state_BHKV = weight_BH[..., None, None] * state_BHKV
            state_BHKV = torch.addcmul(state_BHKV, (gate_BH - scale_BH).exp()[..., None, None] * k_BHK1, v_BH1V)
        state_BHKV = problem.only(real_B, state_BHKV)
        seen_BHKV, unit_BH = state_BHKV, scale_BH
        if problem.op.read == "exclusive":
            seen_BHKV, unit_BH = _exclusive(steps, t, before_BHKV, before_BH, k_BHK1 * v_BH1V)
            seen_BHKV = problem.only(real_B, seen_BHKV)
        out_BHV = torch.einsum("bhk,bhkv->bhv", steps.q[:, t], seen_BHKV)
        outputs.append(torch.cat([out_BHV, unit_BH[..., None]], -1) if stabilised else out_BHV)
    out = torch.stack(outputs, dim=1)
    if stabilised:
        row = scale_BH[..., None, None].expand(-1, -1, 1, state_BHKV.shape[-1])
        state_BHKV = torch.cat([state_BHKV, row], dim=2)
    return out if problem.exact else out.to(problem.inputs.q.dtype), state_BHKV


def _steps(problem: Problem[GatedLinearInputs]) -> Steps:
    q, k, v, log_decay, value_log_decay, bonus, log_input = problem.inputs
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2).to(problem.dtype) for x in (q, k))
    v = v.to(problem.dtype)
    if problem.op.raw:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    bonus, log_input = (x if x is None else x.to(problem.dtype) for x in (bonus, log_input))
    by_head = None
    if log_input is not None:
        by_head = torch.zeros_like(log_input) if log_decay is None else log_decay.to(problem.dtype).expand_as(log_input)
        log_decay = None
    decay, value_decay = _decay(log_decay, k), None if value_log_decay is None else _decay(value_log_decay, v)
    return Steps(problem.scale * q, k, v, decay, value_decay, bonus, log_input, by_head)


def _decay(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """e^{log_decay} for every token, head and channel."""
    if log_decay is None:
        return torch.ones_like(like)
    decay = log_decay.to(like.dtype).exp()
    return (decay if log_decay.dim() in (2, 4) else decay[..., None]).expand_as(like)


def _entering(problem: Problem[GatedLinearInputs], initial_state: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor]:
    """The state before the first token, and its log scale."""
    if initial_state is None:
        state = steps.q.new_zeros(*steps.k[:, 0].shape, steps.v.shape[-1])
        return state, torch.full_like(state[..., 0, 0], LOWEST)
    if steps.log_input is None:
        return problem.entering(initial_state), initial_state.new_full(initial_state.shape[:2], LOWEST)
    entering = problem.entering(initial_state)
    return entering[:, :, :-1], entering[:, :, -1, 0].detach()


def _exclusive(steps: Steps, t: int, before: Tensor, scale: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """What token t sees of the state before it and, by the bonus, of itself; and its log scale."""
    if steps.bonus is None:
        return before, scale
    own = steps.bonus[None, :, :, None] * kv
    if steps.log_input is None:
        return before + own, scale
    gate = steps.log_input[:, t]
    unit = torch.maximum(scale, gate).detach().clamp(min=LOWEST)
    seen = (scale - unit).exp()[..., None, None] * before + (gate - unit).exp()[..., None, None] * own
    return seen, unit
