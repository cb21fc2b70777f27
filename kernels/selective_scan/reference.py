"""The selective scan as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import SelectiveInputs


def forward(problem: Problem[SelectiveInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = decay_t h_{t−1} + Δ_t x_t b_t; y_t = h_t c_t, with h = 0 before a document's first token.

    The decay is e^{Δ_t a}, or 1 − Δ_t b_t² without a (Longhorn).
    """
    x, delta, a, b, c = problem.inputs
    x_BTD, delta_BTD, b_BTN, c_BTN = (tensor.to(problem.dtype) for tensor in (x, delta, b, c))
    a_DN = None if a is None else a.to(problem.dtype)
    state_BDN = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        delta_BD1, b_B1N = delta_BTD[:, t, :, None], b_BTN[:, t, None]
        decay_BDN = 1 - delta_BD1 * b_B1N.square() if a_DN is None else (delta_BD1 * a_DN).exp()
        state_BDN = decay_BDN * problem.only(goes_on_B, state_BDN)
        state_BDN = torch.addcmul(state_BDN, delta_BD1 * x_BTD[:, t, :, None], b_B1N)
        state_BDN = problem.only(real_B, state_BDN)
        outputs.append((state_BDN * c_BTN[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1).to(problem.dtype if problem.exact else x.dtype), state_BDN
