"""Gated linear attention as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from .stable import NOTHING


class Steps(NamedTuple):
    """The tensors of a call, as its recurrence reads them: every head its own, `[B, T, H, …]`."""

    q: Tensor  # scaled
    k: Tensor
    v: Tensor  # with a column of ones where there is a normaliser
    decay: Tensor  # [B, T, H, K]
    value_decay: Tensor  # [B, T, H, V]
    bonus: Tensor | None  # [H, K]
    log_input: Tensor | None  # [B, T, H]
    log_decay: Tensor | None  # [B, T, H], beside log_input


def forward(
    inputs: tuple[Tensor | None, ...],
    initial_state: Tensor | None,
    documents: Documents,
    scale: float,
    *,
    read: str,
    normaliser: str | None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(e^{g_t}) S_{t−1} diag(e^{w_t}) + e^{i_t} k_tᵀ v_t, with S = 0 before a document's first token, and

        o_t = scale q_t S_t        or, exclusively,        o_t = scale q_t (S_{t−1} + diag(u) e^{i_t} k_tᵀ v_t)

    as `GatedLinearRecurrence.forward` returns it. With an input gate i, what is kept of S is S̃ with S = e^m S̃, and the
    output's last column the log scale that its others have been divided by.
    """
    steps = _steps(inputs, scale, normaliser)
    stabilised = steps.log_input is not None
    ids_BT = documents.ids(steps.q.device)
    state_BHKV, scale_BH = _entering(initial_state, steps, documents)
    outputs = []
    for t in range(steps.q.shape[1]):
        goes_on = ids_BT[:, t] == ids_BT[:, t - 1] if t > 0 else torch.tensor(documents.continues, device=ids_BT.device)
        keep_B, real_B = goes_on[:, None], (ids_BT[:, t] >= 0)[:, None]
        state_BHKV = torch.where(keep_B[..., None, None], state_BHKV, torch.zeros_like(state_BHKV))
        scale_BH = torch.where(keep_B, scale_BH, NOTHING)
        before_BHKV, before_BH = state_BHKV, scale_BH
        kv_BHKV = steps.k[:, t, :, :, None] * steps.v[:, t, :, None, :]
        decayed_BHKV = steps.decay[:, t, :, :, None] * state_BHKV * steps.value_decay[:, t, :, None, :]
        if steps.log_input is None or steps.log_decay is None:
            state_BHKV = decayed_BHKV + kv_BHKV
        else:
            gate_BH, log_decay_BH = torch.where(real_B, steps.log_input[:, t], NOTHING), steps.log_decay[:, t]
            scale_BH = torch.maximum(scale_BH + log_decay_BH, gate_BH).detach().clamp(min=NOTHING)
            weight_BH = (log_decay_BH + before_BH - scale_BH).exp()
            state_BHKV = weight_BH[..., None, None] * state_BHKV
            state_BHKV = state_BHKV + (gate_BH - scale_BH).exp()[..., None, None] * kv_BHKV
        state_BHKV = torch.where(real_B[..., None, None], state_BHKV, torch.zeros_like(state_BHKV))
        seen_BHKV, unit_BH = state_BHKV, scale_BH
        if read == "exclusive":
            seen_BHKV, unit_BH = _exclusive(steps, t, before_BHKV, before_BH, kv_BHKV)
            seen_BHKV = torch.where(real_B[..., None, None], seen_BHKV, torch.zeros_like(seen_BHKV))
        out_BHV = torch.einsum("bhk,bhkv->bhv", steps.q[:, t], seen_BHKV)
        outputs.append(torch.cat([out_BHV, unit_BH[..., None]], -1) if stabilised else out_BHV)
    out = torch.stack(outputs, dim=1)
    if stabilised:
        row = scale_BH[..., None, None].expand(-1, -1, 1, state_BHKV.shape[-1])
        state_BHKV = torch.cat([state_BHKV, row], dim=2)
    q = inputs[0]
    assert q is not None
    return out if exact or normaliser is not None else out.to(q.dtype), state_BHKV


def _steps(inputs: tuple[Tensor | None, ...], scale: float, normaliser: str | None) -> Steps:
    q, k, v, log_decay, value_log_decay, bonus, log_input = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    heads = v.shape[2]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2).to(accumulate) for x in (q, k))
    v = v.to(accumulate)
    if normaliser is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    bonus, log_input = (x if x is None else x.to(accumulate) for x in (bonus, log_input))
    by_head = None
    if log_input is not None:
        by_head = torch.zeros_like(log_input) if log_decay is None else log_decay.to(accumulate).expand_as(log_input)
        log_decay = None
    return Steps(scale * q, k, v, _decay(log_decay, k), _decay(value_log_decay, v), bonus, log_input, by_head)


def _decay(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """e^{log_decay} for every token, head and channel."""
    if log_decay is None:
        return torch.ones_like(like)
    decay = log_decay.to(like.dtype).exp()
    return (decay if log_decay.dim() in (2, 4) else decay[..., None]).expand_as(like)


def _entering(initial_state: Tensor | None, steps: Steps, documents: Documents) -> tuple[Tensor, Tensor]:
    """The state before the first token, and its log scale."""
    state = steps.q.new_zeros(*steps.k[:, 0].shape, steps.v.shape[-1])
    scale = torch.full_like(state[..., 0, 0], NOTHING)
    if initial_state is None:
        return state, scale
    given = initial_state.to(state.dtype)
    if steps.log_input is not None:
        given, scale = given[:, :, :-1], given[:, :, -1, 0].detach()
    # What is not a number where nothing goes on stays out of the sums of its gradient too.
    enters = torch.tensor(documents.continues, device=state.device)[:, None, None, None]
    return torch.where(enters, given, state), scale


def _exclusive(steps: Steps, t: int, before: Tensor, scale: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """What token t sees of the state before it and, by the bonus, of itself; and its log scale."""
    if steps.bonus is None:
        return before, scale
    own = steps.bonus[None, :, :, None] * kv
    if steps.log_input is None:
        return before + own, scale
    gate = steps.log_input[:, t]
    unit = torch.maximum(scale, gate).detach().clamp(min=NOTHING)
    seen = (scale - unit).exp()[..., None, None] * before + (gate - unit).exp()[..., None, None] * own
    return seen, unit


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    initial_state: Tensor,
    documents: Documents,
    scale: float,
    *,
    read: str,
    normaliser: str | None,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradients of `inputs` and of `initial_state`, by autograd through the recurrence."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (*inputs, initial_state)]
        state = leaves[-1]
        out, final_state = forward(tuple(leaves[:-1]), state, documents, scale, read=read, normaliser=normaliser)
        dfinal = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state.to(final_state.dtype)
        wanted = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([out, final_state], wanted, [dout.to(out.dtype), dfinal], allow_unused=True))
    gradients = [None if x is None else next(found) for x in leaves]
    filled = [torch.zeros_like(x) if x is not None and d is None else d for x, d in zip(leaves, gradients, strict=True)]
    dinitial = filled[-1]
    assert dinitial is not None
    return tuple(filled[:-1]), dinitial
