"""Exponential input gates without overflow: states and outputs kept relative to running log scales.

With input gates i and decays g, the true state is Σ_j e^{G_t − G_j + i_j} k_jᵀ v_j. What is kept is S̃, S = e^m S̃, and

    m_t = max(m_{t−1} + g_t, i_t),

so that both factors of S̃_t = e^{g_t + m_{t−1} − m_t} S̃_{t−1} + e^{i_t − m_t} k_tᵀ v_t are at most 1: a plain gated
recurrence with another decay and scaled keys. Since no result depends on m, gradients take it for a constant and are
exact (Beck et al., 2024, arXiv 2405.04517).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import PADDING, Documents, continuing

# The log scale of a zero state: finite, so that differences are; a power of two, so that it is the same in every type.
LOWEST = -(2.0**100)


class LogScales:
    """The scales of the tokens of a call, in float64: before and after each, and what they make of its decays."""

    def __init__(
        self, log_decay: Tensor | None, log_input: Tensor, entering: Tensor | None, documents: Documents
    ) -> None:
        device = log_input.device
        ids = documents.ids(device)
        self.real = (ids != PADDING)[..., None]
        self.goes_on = documents.on(device, going_on)[..., None]
        self.gates = log_input.double().masked_fill(~self.real, -torch.inf)
        decays = torch.zeros_like(self.gates) if log_decay is None else log_decay.double().expand_as(self.gates)
        first = self.gates.new_full(self.gates[:, 0].shape, LOWEST)
        if entering is not None:
            first = torch.where(self.goes_on[:, 0], entering.double(), first)
        self.after = _running_maxima(decays.masked_fill(~self.goes_on, -torch.inf), self.gates, first)
        before = torch.cat([first[:, None], self.after[:, :-1]], dim=1)
        self.before = before.masked_fill(~self.goes_on, LOWEST)
        # Of a document's first token it does not matter; rounding must not make any positive.
        self.log_decay = (decays + self.before - self.after).masked_fill(~self.goes_on, 0.0).clamp_(max=0.0)


def going_on(documents: Documents) -> Tensor:
    """bool `[B, T]`, on the host: whether a state is there before the token, of its own document."""
    ids = documents.ids()
    return torch.cat([continuing(documents)[:, None], ids[:, 1:] == ids[:, :-1]], dim=1) & (ids != PADDING)


def _running_maxima(decays: Tensor, gates: Tensor, first: Tensor) -> Tensor:
    """m_t = max(m_{t−1} + decay_t, gate_t) from `first` on, at least LOWEST: `[B, T, H]`, by doubling reaches."""
    maxima, sums = gates.clone(), decays.clone()
    maxima[:, 0] = torch.maximum(gates[:, 0], first + decays[:, 0])
    step = 1
    while step < maxima.shape[1]:
        maxima[:, step:] = torch.maximum(maxima[:, step:], sums[:, step:] + maxima[:, :-step])
        sums[:, step:] = sums[:, step:] + sums[:, :-step]
        step *= 2
    return maxima.clamp_(min=LOWEST)


def pack(state: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, K, V]` in units of e^scale, with a last row that holds the scale: `[B, H, K + 1, V]`."""
    rounded = scale.to(dtype)
    exact = state * (scale - rounded).exp().to(dtype)[..., None, None]
    return torch.cat([exact, rounded[..., None, None].expand(-1, -1, 1, state.shape[-1])], dim=2)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The state `[B, H, K, V]`, and its scale `[B, H]`."""
    return packed[:, :, :-1], packed[:, :, -1, 0]


def advance(packed: Tensor, log_transition: Tensor, own: Tensor) -> Tensor:
    """`own` plus the state before, decayed by e^log_transition `[B, H, 1, 1]`, both packed."""
    (before, old), (state, new) = unpack(packed), unpack(own)
    reaching = old + log_transition[..., 0, 0]
    scale = torch.maximum(reaching, new).clamp(min=LOWEST)
    weights = [(x - scale).exp()[..., None, None] for x in (reaching, new)]
    return pack(weights[0] * before + weights[1] * state, scale, packed.dtype)


def retreat(dpacked: Tensor, log_transition: Tensor, local: Tensor) -> Tensor:
    """The gradient of the state before, given that of the state after and what the tokens between add themselves.

    Gradients of states carry the scales of their states: S̃ in units of e^m has e^m times the gradient of the true S.
    """
    (dstate, after), (own, before) = unpack(dpacked), unpack(local)
    weight = (
        (before + log_transition[..., 0, 0] - after).clamp(max=0.0).exp()
    )  # nothing is larger; a zero may come bare
    return torch.cat([own + weight[..., None, None] * dstate, local[:, :, -1:]], dim=2)
