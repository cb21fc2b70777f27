"""Recurrences on a sequence of which this rank holds a part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.delta_rule import DeltaRecurrence
from ...kernels.diagonal_scan import DiagonalRecurrence
from ...kernels.gated_linear import GatedLinearRecurrence
from ...kernels.recurrence import Inputs, Recurrence
from ...kernels.selective_scan import SelectiveRecurrence
from ..operation import Setting
from ..sequence import Sequence
from ..strategies.state_passing import StatePassing
from .mixing import mix_by


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
    settings = (read, normaliser, log_input is not None)
    inputs = (q, k, v, log_decay, value_log_decay, bonus, log_input)
    raw = _recurrent(GatedLinearRecurrence, settings, inputs, seq, scale, slot)
    return GatedLinearRecurrence(*settings).finish(raw, q.dtype)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    seq: Sequence,
    erase: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    slot: str = "state",
) -> Tensor:
    """S_t = (I − β_t k_tᵀk_t) diag(e^{g_t}) S_{t−1} + β_t k_tᵀ v_t;  o_t = scale q_t S_t over the whole row.

    q, k `[B, T, H or G, K]`, v `[B, T, H, V]`, `beta` `[B, T, H]`; `log_decay` None, `[B, T, H]` or `[B, T, H, K]`;
    `erase` = (a, b), shaped like k, in place of beta for (diag(e^{g_t}) + b_tᵀ a_t) S_{t−1} + k_tᵀ v_t. Returns
    `[B, T, H, V]` in q's type. See `longreach.kernels.delta_rule`.
    """
    a, b = (None, None) if erase is None else erase
    return _recurrent(DeltaRecurrence, (), (q, k, v, beta, log_decay, a, b), seq, scale, slot)


def diagonal_scan(x: Tensor, log_decay: Tensor, *, seq: Sequence, slot: str = "state") -> Tensor:
    """h_t = e^{a_t} h_{t−1} + x_t over the whole row: every h `[B, T, …]` in x's type.

    x `[B, T, …]`; `log_decay` like x, or constant with x's dims of channels. See `longreach.kernels.diagonal_scan`.
    """
    return _recurrent(DiagonalRecurrence, (), (x, log_decay), seq, None, slot)


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
    return _recurrent(SelectiveRecurrence, (decay,), (x, delta, a, b, c), seq, None, slot, common=(3, 4))


def _recurrent(
    build: Callable[..., Recurrence],
    settings: tuple[Setting, ...],
    inputs: Inputs,
    seq: Sequence,
    scale: float | None,
    slot: str,
    common: tuple[int, ...] = (),
) -> Tensor:
    """The recurrence `build(*settings)` over the whole row, or continued from the decoding cache."""
    if seq.cache is None:
        by_heads = seq.strategy.recurrent == "ulysses"
        settings = (scale, build, *settings)
        return mix_by(_state_passing, settings, inputs, seq, slot, by_heads=by_heads, common=common)
    recurrence = build(*settings)
    recurrence.check(inputs)
    state = seq.cache.entries.get((seq.layer, slot), (None,))[0]
    out, final = recurrence.forward(inputs, state, seq.local, scale=scale, backend=seq.backend)
    seq.cache.entries[seq.layer, slot] = (final,)
    return out


def _state_passing(scale: float | None, build: Callable[..., Recurrence], *settings: Setting) -> StatePassing:
    return StatePassing(build(*settings), scale)
