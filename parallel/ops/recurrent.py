"""Recurrences on a sequence of which this rank holds a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.delta_rule import DeltaRecurrence, delta_inputs
from ...kernels.diagonal_scan import DiagonalRecurrence, flat_inputs
from ...kernels.diagonal_ssm import StateSpaceInputs, StateSpaceRecurrence
from ...kernels.gated_linear import GatedLinearInputs, GatedLinearRecurrence
from ...kernels.log_linear import LogLinearInputs, LogLinearRecurrence
from ...kernels.mesa import MesaInputs, MesaRecurrence
from ...kernels.problem import Record
from ...kernels.recurrence import Recurrence
from ...kernels.selective_scan import SelectiveInputs, SelectiveRecurrence
from ...kernels.serial import Serial
from ...kernels.slot_attention import SlotInputs, SlotRecurrence
from ...kernels.slstm import SLSTMInputs, SLSTMRecurrence
from ...kernels.wkv import WKVInputs, WKVRecurrence
from ..operation import Setting, check_class, mix
from ..sequence import Sequence
from ..strategies.serial import SerialPassing
from ..strategies.state_passing import StatePassing
from ..strategies.ulysses import ulysses


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    value_log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    read: str = "inclusive",
    normaliser: str | None = None,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = diag(e^{g_t}) S_{t−1} + k_tᵀ v_t;  o_t = scale q_t S_t over the whole row: `[B, T, H, V]` in q's type.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`; `log_decay` None, `[H]`, `[H, K]`, `[B, T, H]` or `[B, T, H, K]`. For
    these and the variants see `longreach.kernels.gated_linear`.
    """
    settings = (read, normaliser, log_input is not None, scale)
    inputs = GatedLinearInputs(q, k, v, log_decay, value_log_decay, bonus, log_input)
    raw = recurrent(GatedLinearRecurrence, inputs, settings, seq=seq, slot=slot)
    return GatedLinearRecurrence(*settings).finish(raw, q.dtype)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    erase: Tensor | tuple[Tensor, Tensor] | None = None,
    erase_first: bool = False,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = (I − β_t k_tᵀk_t) diag(e^{g_t}) S_{t−1} + β_t k_tᵀ v_t;  o_t = scale q_t S_t over the whole row.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`, `beta` `[B, T, H]`; `log_decay` None, `[B, T, H]` or `[B, T, H, K]`;
    `erase`, shaped like k, is what is erased under in place of k_t, before the decay with `erase_first`; a pair (a, b)
    in place of beta makes it (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t. With k `[B, T, H, N, K]`, and v and beta
    alike, each token takes N steps. Returns `[B, T, H, V]` in q's type. See `longreach.kernels.delta_rule`.
    """
    inputs = delta_inputs(q, k, v, beta, log_decay, erase)
    return recurrent(DeltaRecurrence, inputs, (scale, erase_first), seq=seq, slot=slot)


def diagonal_scan(x: Tensor, log_decay: Tensor, *, seq: Sequence, slot: str = "state") -> Tensor:
    """h_t = e^{a_t} h_{t−1} + x_t over the whole row: every h `[B, T, …]` in x's type.

    x `[B, T, …]`; `log_decay` like x, or constant with x's dims of channels. See `longreach.kernels.diagonal_scan`.
    """
    return recurrent(DiagonalRecurrence, flat_inputs(x, log_decay), seq=seq, slot=slot).view(x.shape)


def diagonal_ssm(
    x: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    real: Tensor,
    imaginary: Tensor,
    *,
    seq: Sequence,
    slot: str = "state",
) -> Tensor:
    """h_t = e^{a + iθ} h_{t−1} + x_t;  y_t = Σ_n Re(c h_t) over the whole row: `[B, T, H, P]` in x's type.

    x `[B, T, H, P]`; a, θ, and real and imaginary part of c `[H, N]`. See `longreach.kernels.diagonal_ssm`.
    """
    inputs = StateSpaceInputs(x, log_decay, angle, real, imaginary)
    return recurrent(StateSpaceRecurrence, inputs, seq=seq, slot=slot)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    *,
    seq: Sequence,
    decay: str = "exponential",
    slot: str = "state",
) -> Tensor:
    """h_t = e^{Δ_t a} h_{t−1} + Δ_t x_t b_t;  y_t = Σ_n h_t c_t over the whole row: `[B, T, D]` in x's type.

    x, delta `[B, T, D]`, a `[D, N]`, b, c `[B, T, N]`; with `decay="longhorn"` 1 − Δ_t b_t² in place of e^{Δ_t a}, and
    a None. See `longreach.kernels.selective_scan`.
    """
    return recurrent(SelectiveRecurrence, SelectiveInputs(x, delta, a, b, c), (decay,), seq=seq, slot=slot)


def wkv(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    seq: Sequence,
    slot: str = "state",
) -> Tensor:
    """The mean of the values so far weighted by the exponentials of their keys, which decay: `[B, T, D]` in k's type.

    k, v `[B, T, D]`; `log_decay` None, `[D]` or `[B, T, D]`; `bonus` `[D]`, of a token's own weight. See
    `longreach.kernels.wkv`.
    """
    return recurrent(WKVRecurrence, WKVInputs(k, v, log_decay, bonus), seq=seq, slot=slot)


def slstm(gates: Tensor, recurrent_weight: Tensor, *, seq: Sequence, slot: str = "state") -> Tensor:
    """h_t = sigmoid(o_t) c_t / n_t, its gates reading h_{t−1}, over the whole row: `[B, T, H, K]` in the gates' type.

    gates `[B, T, H, 4, K]`, recurrent_weight `[H, K * 4 * K]`. See `longreach.kernels.slstm`. Ranks that share a row
    run one after the other, unless they exchange tokens for heads (`ulysses`); see `longreach.kernels.serial`.
    """
    return recurrent(SLSTMRecurrence, SLSTMInputs(gates, recurrent_weight), seq=seq, slot=slot)


def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    regulariser: Tensor,
    *,
    seq: Sequence,
    iterations: int = 30,
    slot: str = "state",
) -> Tensor:
    """o_t = q_t (H_t + diag(regulariser))^{-1} S_t with H_t = Σ e^{G_t − G_i} beta_i k_iᵀ k_i, S_t likewise with v_i.

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, `log_decay` and beta `[B, T, H]`, regulariser `[H, K]`. Returns
    `[B, T, H, V]` in q's type. See `longreach.kernels.mesa`.
    """
    inputs = MesaInputs(q, k, v, log_decay, beta, regulariser)
    return recurrent(MesaRecurrence, inputs, (iterations,), seq=seq, slot=slot)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entering: Tensor,
    log_decay: Tensor,
    *,
    seq: Sequence,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """o_t = softmax(scale q_t K_tᵀ) V_t over M slots: K_t = diag(e^{g_t}) K_{t−1} + s_tᵀ k_t, and V_t likewise of v_t.

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, entering s and `log_decay` g `[B, T, H, M]`. Returns `[B, T, H, V]` in q's
    type. One gather carries the end states of both. See `longreach.kernels.slot_attention`.
    """
    inputs = SlotInputs(q, k, v, entering, log_decay)
    return recurrent(SlotRecurrence, inputs, (scale,), seq=seq, slot=slot)


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_weights: Tensor,
    *,
    seq: Sequence,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """o_t = scale q_t Σ_l w_t^(l) S_t^(l), a decaying state S^(l) for the tokens of each level of a binary tree.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`, `log_decay` `[B, T, H]`, `level_weights` w `[B, T, H, L]`. Returns
    `[B, T, H, V]` in q's type. See `longreach.kernels.log_linear`.
    """
    inputs = LogLinearInputs(q, k, v, log_decay, level_weights)
    return recurrent(LogLinearRecurrence, inputs, (scale,), seq=seq, slot=slot)


def recurrent(
    op: type[Recurrence[Record]],
    inputs: Record,
    settings: tuple[Setting, ...] = (),
    *,
    seq: Sequence,
    slot: str = "state",
) -> Tensor:
    """The output of the recurrence `op(*settings)` over the whole row, or continued from the decoding cache.

    What every op with a state runs through, whoever wrote it: under each strategy, packed, recomputed and decoded.
    `settings` are plain values, by which a compiled graph is keyed. See `longreach.kernels.recurrence`.
    """
    check_class("recurrent", op)
    if seq.decodes:
        return _decoded(op(*settings), inputs, seq, slot)
    if seq.cache is not None:
        out, seq.cache.states[seq.layer, slot] = _state_passing(op, seq.rank, *settings).prefill(inputs, seq)
        return out
    if seq.exchange("recurrent") == "ulysses" and seq.heads is not None:
        ranks = seq.heads.ranks
        arguments = (ranks, op.common, _state_passing, op, seq.rank // ranks, *settings)
        return mix(ulysses, arguments, inputs, seq, slot)[0]
    return mix(_state_passing, (op, seq.rank, *settings), inputs, seq, slot)[0]


@torch.no_grad()
def _decoded(op: Recurrence[Any], inputs: tuple[Tensor | None, ...], seq: Sequence, slot: str) -> Tensor:
    assert seq.cache is not None
    state = seq.cache.states.get((seq.layer, slot))
    if state is None:  # what a layer passes of later tokens is as what it passes of the first
        op.check(inputs)
    problem = op.problem(inputs, seq.local, backend=seq.backend)
    out, final = problem.implementation.forward(problem, state)
    seq.cache.states[seq.layer, slot] = final
    return out


def _state_passing(op: type[Recurrence[Any]], rank: int, *settings: Setting) -> StatePassing | SerialPassing:
    made = op(*settings)
    return SerialPassing(made) if isinstance(made, Serial) else StatePassing(made, rank)
