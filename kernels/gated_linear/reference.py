"""Gated linear attention as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(e^{g_t}) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t, with S = 0 before a document's first token."""
    heads = v.shape[2]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_BTHK, k_BTHK = (x.repeat_interleave(heads // x.shape[2], dim=2).to(accumulate) for x in (q, k))
    v_BTHV = v.to(accumulate)
    decay_BTHK = _decay(log_decay, q_BTHK)
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
        state_BHKV = decay_BTHK[:, t, :, :, None] * state_BHKV + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        state_BHKV = torch.where(real_BT[:, t, :, :, None], state_BHKV, torch.zeros_like(state_BHKV))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV))
    return torch.stack(outputs, dim=1).to(q.dtype), state_BHKV


def _decay(log_decay: Tensor | None, like_BTHK: Tensor) -> Tensor:
    """e^{g} as `[B, T, H, K]`."""
    if log_decay is None:
        return torch.ones_like(like_BTHK)
    decay = log_decay.to(like_BTHK.dtype).exp()
    return (decay if log_decay.dim() == 4 else decay[..., None]).expand_as(like_BTHK)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    initial_state: Tensor,
    documents: Documents,
    scale: float,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradients of `inputs` and of `initial_state`, by autograd through the recurrence."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (*inputs, initial_state)]
        q, k, v, log_decay, state = leaves
        assert q is not None
        assert k is not None
        assert v is not None
        out, final_state = forward(q, k, v, log_decay, state, documents, scale)
        dfinal = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state.to(final_state.dtype)
        wanted = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([out, final_state], wanted, [dout.to(out.dtype), dfinal], allow_unused=True))
    gradients = [None if x is None else next(found) for x in leaves]
    filled = [torch.zeros_like(x) if x is not None and d is None else d for x, d in zip(leaves, gradients, strict=True)]
    dinitial = filled[-1]
    assert dinitial is not None
    return tuple(filled[:-1]), dinitial
