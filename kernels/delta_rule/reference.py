"""The delta rule as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents
from ..recurrence import Inputs


def forward(inputs: Inputs, initial_state: Tensor | None, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
    """S_t = (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t;  S = 0 before a document's first.

    With beta, a_t = -beta_t e^{g_t} ⊙ k_t and b_t = k_t, and what is written is beta_t v_t.
    """
    q, k, v, beta, log_decay, a, b = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK, k_BTHK, v_BTHV = (_wide(x, v.shape[2], accumulate) for x in (q, k, v))
    decay_BTHK = _decay(log_decay, k_BTHK)
    if a is None or b is None:
        beta_BTH1 = torch.ones_like(v_BTHV[..., :1]) if beta is None else beta.to(accumulate)[..., None]
        a_BTHK, b_BTHK, v_BTHV = -beta_BTH1 * decay_BTHK * k_BTHK, k_BTHK, beta_BTH1 * v_BTHV
    else:
        a_BTHK, b_BTHK = (_wide(x, v.shape[2], accumulate) for x in (a, b))
    ids_BT = documents.ids(q.device)
    real_BT = (ids_BT >= 0)[..., None, None]

    state_BHKV = q_BTHK.new_zeros(*k_BTHK[:, 0].shape, v.shape[-1])
    if initial_state is not None:
        enters = torch.tensor(documents.continues, device=q.device)[:, None, None, None]
        state_BHKV = torch.where(enters, initial_state.to(accumulate), state_BHKV)
    outputs = []
    for t in range(q.shape[1]):
        if t > 0:
            same = (ids_BT[:, t] == ids_BT[:, t - 1])[:, None, None, None]
            state_BHKV = torch.where(same, state_BHKV, torch.zeros_like(state_BHKV))
        erased_BHV = torch.einsum("bhk,bhkv->bhv", a_BTHK[:, t], state_BHKV)
        state_BHKV = (
            decay_BTHK[:, t, :, :, None] * state_BHKV
            + b_BTHK[:, t, :, :, None] * erased_BHV[:, :, None, :]
            + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        )
        state_BHKV = torch.where(real_BT[:, t, :, :, None], state_BHKV, torch.zeros_like(state_BHKV))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV))
    return torch.stack(outputs, dim=1).to(q.dtype), state_BHKV


def _wide(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2).to(dtype)


def _decay(log_decay: Tensor | None, like_BTHK: Tensor) -> Tensor:
    """e^{g} as `[B, T, H, K]`."""
    if log_decay is None:
        return torch.ones_like(like_BTHK)
    decay = log_decay.to(like_BTHK.dtype).exp()
    return (decay if log_decay.dim() == 4 else decay[..., None]).expand_as(like_BTHK)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    inputs: Inputs,
    initial_state: Tensor,
    documents: Documents,
    scale: float,
) -> tuple[Inputs, Tensor]:
    """The gradients of `inputs` and of `initial_state`, by autograd through the recurrence."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (*inputs, initial_state)]
        out, final_state = forward(tuple(leaves[:-1]), leaves[-1], documents, scale)
        dfinal = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state.to(final_state.dtype)
        wanted = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([out, final_state], wanted, [dout.to(out.dtype), dfinal], allow_unused=True))
    gradients = [None if x is None else next(found) for x in leaves]
    filled = [torch.zeros_like(x) if x is not None and d is None else d for x, d in zip(leaves, gradients, strict=True)]
    dinitial = filled[-1]
    assert dinitial is not None
    return tuple(filled[:-1]), dinitial


def begin(inputs: Inputs, documents: Documents, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, transition `[B, H, K, K]`, state `[B, H, K, V]`, reads `[B, T, H, K]`): of nothing, and of the identity."""
    q, k, v, *rest = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    keys = k.shape[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    padded = torch.cat([v, v.new_zeros(*v.shape[:3], keys)], dim=-1)
    start = torch.eye(keys, dtype=wide, device=v.device).expand(v.shape[0], v.shape[2], -1, -1)
    start = torch.cat([start.new_zeros(*start.shape[:3], v.shape[-1]), start], dim=-1)
    (out, reads), (state, transition) = (
        x.split([v.shape[-1], keys], dim=-1) for x in forward((q.to(wide), k, padded, *rest), start, documents, scale)
    )
    return out, transition, state, reads
