"""The diagonal scan as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents


def forward(
    x: Tensor, log_decay: Tensor, initial_state: Tensor | None, documents: Documents, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """h_t = e^{a_t} h_{t−1} + x_t, with h = 0 before a document's first token; x `[B, T, D]`, log_decay like it."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_BTD = x.to(accumulate)
    decay_BTD = log_decay.to(accumulate).exp().expand_as(x_BTD)
    ids_BT1 = documents.ids(x.device)[..., None]

    state_BD = torch.zeros_like(x_BTD[:, 0])
    if initial_state is not None:
        enters = torch.tensor(documents.continues, device=x.device)[:, None]
        state_BD = torch.where(enters, initial_state.to(accumulate), state_BD)
    states = []
    for t in range(x.shape[1]):
        if t > 0:
            state_BD = torch.where(ids_BT1[:, t] == ids_BT1[:, t - 1], state_BD, torch.zeros_like(state_BD))
        state_BD = decay_BTD[:, t] * state_BD + x_BTD[:, t]
        state_BD = torch.where(ids_BT1[:, t] >= 0, state_BD, torch.zeros_like(state_BD))
        states.append(state_BD)
    return torch.stack(states, dim=1).to(accumulate if exact else x.dtype), state_BD


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, log_decay and the initial state, by autograd through the recurrence."""
    with torch.enable_grad():
        entering = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
        leaves = [tensor.detach().requires_grad_() for tensor in (x, log_decay, entering)]
        out, final_state = forward(leaves[0], leaves[1], leaves[2], documents)
        dfinal = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state.to(final_state.dtype)
        dx, dlog_decay, dinitial = torch.autograd.grad(
            [out, final_state], leaves, [dout.to(out.dtype), dfinal], materialize_grads=True
        )
    return dx, dlog_decay, dinitial
