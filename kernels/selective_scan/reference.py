"""The selective scan as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import Documents


def forward(
    x: Tensor,
    delta: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    documents: Documents,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = decay_t h_{t−1} + Δ_t x_t b_t; y_t = h_t c_t, with h = 0 before a document's first token.

    The decay is e^{Δ_t a}, or 1 − Δ_t b_t² without a (Longhorn).
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_BTD, delta_BTD, b_BTN, c_BTN = (tensor.to(accumulate) for tensor in (x, delta, b, c))
    ids_BT11 = documents.ids(x.device)[..., None, None]

    state_BDN = x_BTD.new_zeros(x.shape[0], x.shape[2], b.shape[2])
    if initial_state is not None:
        enters = torch.tensor(documents.continues, device=x.device)[:, None, None]
        state_BDN = torch.where(enters, initial_state.to(accumulate), state_BDN)
    outputs = []
    for t in range(x.shape[1]):
        delta_BD1, b_B1N = delta_BTD[:, t, :, None], b_BTN[:, t, None]
        decay_BDN = 1 - delta_BD1 * b_B1N.square() if a is None else (delta_BD1 * a.to(accumulate)).exp()
        if t > 0:
            state_BDN = torch.where(ids_BT11[:, t] == ids_BT11[:, t - 1], state_BDN, torch.zeros_like(state_BDN))
        state_BDN = decay_BDN * state_BDN + delta_BD1 * x_BTD[:, t, :, None] * b_B1N
        state_BDN = torch.where(ids_BT11[:, t] >= 0, state_BDN, torch.zeros_like(state_BDN))
        outputs.append((state_BDN * c_BTN[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1).to(accumulate if exact else x.dtype), state_BDN


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    initial_state: Tensor,
    documents: Documents,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradients of (x, delta, a, b, c) and of the initial state, by autograd through the recurrence."""
    with torch.enable_grad():
        leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in (*inputs, initial_state)]
        x, delta, a, b, c, state = leaves
        assert x is not None
        assert delta is not None
        assert b is not None
        assert c is not None
        out, final_state = forward(x, delta, a, b, c, state, documents)
        dfinal = torch.zeros_like(final_state) if dfinal_state is None else dfinal_state.to(final_state.dtype)
        wanted = [leaf for leaf in leaves if leaf is not None]
        given = [dout.to(out.dtype), dfinal]
        found = iter(torch.autograd.grad([out, final_state], wanted, given, materialize_grads=True))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    dinitial = gradients.pop()
    assert dinitial is not None
    return tuple(gradients), dinitial
