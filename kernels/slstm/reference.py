"""sLSTM as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem
from . import GATES, SLSTMInputs, usable


def forward(problem: Problem[SLSTMInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = sigmoid(o_t) c_t / n_t, see `slstm`; from the empty state at a document's first token."""
    gates_BTHGK, recurrent_HR = (x.to(problem.dtype) for x in problem.inputs)
    recurrent_HKGK = recurrent_HR.unflatten(1, (-1, GATES, gates_BTHGK.shape[-1]))
    state_BHGK = problem.entering(initial_state)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        before = torch.where(goes_on_B[:, None, None, None], state_BHGK, 0.0)
        h_BHK, c_BHK, n_BHK, m_BHK = usable(before)
        i_BHK, f_BHK, z_BHK, o_BHK = (gates_BTHGK[:, t] + torch.einsum("bhk,hkgj->bhgj", h_BHK, recurrent_HKGK)).unbind(
            2
        )
        decayed_BHK = m_BHK.detach() + F.logsigmoid(f_BHK)
        scale_BHK = torch.maximum(decayed_BHK, i_BHK).detach()
        forget_BHK, enter_BHK = (decayed_BHK - scale_BHK).exp(), (i_BHK - scale_BHK).exp()
        c_BHK = forget_BHK * c_BHK + enter_BHK * torch.tanh(z_BHK)
        n_BHK = forget_BHK * n_BHK + enter_BHK
        h_BHK = torch.sigmoid(o_BHK) * c_BHK / n_BHK
        state_BHGK = torch.stack([h_BHK, c_BHK, n_BHK, scale_BHK], dim=2)
        state_BHGK = torch.where(real_B[:, None, None, None], state_BHGK, 0.0)
        outputs.append(state_BHGK[:, :, 0])
    out = torch.stack(outputs, dim=1)
    return out if problem.exact else out.to(problem.inputs.gates.dtype), state_BHGK
