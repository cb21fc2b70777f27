"""The diagonal scan as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import DiagonalInputs


def forward(problem: Problem[DiagonalInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = e^{a_t} h_{t−1} + x_t, with h = 0 before a document's first token."""
    x_BTD = problem.inputs.x.to(problem.dtype)
    decay_BTD = problem.inputs.log_decay.to(problem.dtype).exp().expand_as(x_BTD)
    state_BD = problem.entering(initial_state)
    states = []
    for t, goes_on_B, real_B in problem.tokens():
        state_BD = problem.only(goes_on_B, state_BD)
        state_BD = problem.only(real_B, decay_BTD[:, t] * state_BD + x_BTD[:, t])
        states.append(state_BD)
    return torch.stack(states, dim=1).to(problem.dtype if problem.exact else problem.inputs.x.dtype), state_BD
