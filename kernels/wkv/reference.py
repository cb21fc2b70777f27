"""WKV as its recurrence, token by token: written to be read, and differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gated_linear.stable import LOWEST
from ..problem import Problem
from . import WKVInputs


def forward(problem: Problem[WKVInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """With sums n and d relative to e^m,

    out_t = (e^m n + e^{u + k_t} v_t) / (e^m d + e^{u + k_t})      of the state before t
    n_t = e^{w_t} n_{t-1} + e^{k_t} v_t     d_t = e^{w_t} d_{t-1} + e^{k_t}     m_t = max(m_{t-1} + w_t, k_t)
    """
    k_BTD, v_BTD, decay, bonus = (None if x is None else x.to(problem.dtype) for x in problem.inputs)
    assert k_BTD is not None
    assert v_BTD is not None
    decay_BTD = (torch.zeros_like(k_BTD[0, 0]) if decay is None else decay).expand_as(k_BTD)
    bonus_D = torch.zeros_like(k_BTD[0, 0]) if bonus is None else bonus
    sums_BD2, scale_BD = problem.new_states()[..., :2], torch.full_like(k_BTD[:, 0], LOWEST)
    if initial_state is not None:
        sums_BD2 = problem.entering(initial_state)[..., :2]
        scale_BD = torch.where(problem.continues[:, None], initial_state[..., 2].detach(), scale_BD).to(problem.dtype)
    outputs = []
    for t, goes_on_B, real_B in problem.tokens():
        keep_B1, real_B1, k_BD = goes_on_B[:, None], real_B[:, None], k_BTD[:, t]
        pair_BD2 = torch.stack([v_BTD[:, t], torch.ones_like(k_BD)], dim=-1)
        sums_BD2, scale_BD = (
            torch.where(keep_B1[..., None], sums_BD2, 0.0),
            torch.where(keep_B1, scale_BD, LOWEST),
        )
        unit_BD = torch.maximum(scale_BD, bonus_D + k_BD).detach()
        seen_BD2 = _weighed(scale_BD - unit_BD, sums_BD2) + _weighed(bonus_D + k_BD - unit_BD, pair_BD2)
        outputs.append(torch.where(real_B1, seen_BD2[..., 0] / seen_BD2[..., 1], 0.0))
        reach_BD = scale_BD + decay_BTD[:, t]
        scale_BD = torch.maximum(reach_BD, k_BD).detach()
        sums_BD2 = _weighed(reach_BD - scale_BD, sums_BD2) + _weighed(k_BD - scale_BD, pair_BD2)
        sums_BD2 = torch.where(real_B1[..., None], sums_BD2, 0.0)
        scale_BD = torch.where(real_B1, scale_BD, LOWEST)
    out = torch.stack(outputs, dim=1)
    state = torch.cat([sums_BD2, scale_BD[..., None]], dim=-1)
    return out if problem.exact else out.to(problem.inputs.k.dtype), state


def _weighed(log_weight: Tensor, sums: Tensor) -> Tensor:
    return log_weight.exp()[..., None] * sums
