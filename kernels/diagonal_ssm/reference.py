"""The diagonal state space model as its recurrence, token by token: written to be read, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import StateSpaceInputs, as_pairs, powers, product


def forward(problem: Problem[StateSpaceInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = e^{a + iθ} h_{t−1} + x_t; y_t = Σ_n Re(c h_t), with h = 0 before a document's first token."""
    x_BTHP = problem.inputs.x.to(problem.dtype)
    _, log_decay, angle, real, imaginary = problem.inputs
    step_HN12 = as_pairs(*powers(log_decay, angle, torch.tensor(1, device="cpu"), problem.dtype)).unsqueeze(2)
    real_HN1, imaginary_HN1 = (part.to(problem.dtype).unsqueeze(2) for part in (real, imaginary))
    state_BHNP2 = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        state_BHNP2 = torch.where(goes_on_B[:, None, None, None, None], state_BHNP2, 0.0)
        entering_BH1P = x_BTHP[:, t].unsqueeze(2)
        state_BHNP2 = product(step_HN12, state_BHNP2) + as_pairs(entering_BH1P, torch.zeros_like(entering_BH1P))
        state_BHNP2 = torch.where(real_B[:, None, None, None, None], state_BHNP2, 0.0)
        h_real_BHNP, h_imaginary_BHNP = state_BHNP2.unbind(-1)
        outputs.append((real_HN1 * h_real_BHNP - imaginary_HN1 * h_imaginary_BHNP).sum(2))
    return torch.stack(outputs, dim=1).to(problem.dtype if problem.exact else problem.inputs.x.dtype), state_BHNP2
