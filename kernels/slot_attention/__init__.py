"""Slot attention: softmax over a few slots, which hold decaying sums of the keys and values that entered them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gated_linear
from ..documents import Documents
from ..operation import Tensors
from ..problem import Problem, per_row
from ..recurrence import Beginning, Diagonal, Summary


class SlotInputs(NamedTuple):
    """Tensors of a call; `entering` is how much of a token's key and value enters each slot."""

    q: Tensor
    k: Tensor
    v: Tensor
    entering: Tensor
    log_decay: Tensor


@dataclass(frozen=True)
class SlotRecurrence(Diagonal[SlotInputs]):
    """The recurrence of slot attention. Its state is the slots' keys and values side by side, which decay alike.

    Weights are no linear function of the state that enters. But the state needs no weights: it is computed first, and
    `correct` computes the outputs. What is kept for backward as `reads` are the weights of the slots.
    """

    scale: float | None = None

    name = "slot_attention"
    record = SlotInputs
    dims = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "entering": "B T H M", "log_decay": "B T H M"}
    out, state = "B T H V", "B H M K+V"
    keeps_reads = True

    def transition_dims(self, inputs: SlotInputs) -> str:
        return "B H M 1"

    def reads_dims(self) -> str:
        return "B T H M"

    def empty_results(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As for every op; weights are kept in the type of the accumulators."""
        out, state, transition, weights = super().empty_results(tensors)
        assert weights is not None
        return out, state, transition, weights.to(state.dtype)

    def run(self, problem: Problem[SlotInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, _, weights = problem.implementation.attend(problem, initial_state)
        return out, weights

    def begin(self, problem: Problem[SlotInputs]) -> Beginning:
        summary = Summary(self.transition(problem), problem.implementation.final_state(problem))
        weights = torch.empty_like(problem.inputs.entering, dtype=problem.dtype)
        return Beginning(problem.new_output(), summary, weights)

    def transition(self, problem: Problem[SlotInputs]) -> Tensor:
        """e^{sum of the row's log decays} `[B, H, M, 1]`; 0 unless one document goes through."""
        total = problem.inputs.log_decay.sum(1, dtype=torch.float64)[..., None]
        return torch.where(per_row(problem.through, total), total.exp().to(problem.dtype), 0.0)

    def correct(self, problem: Problem[SlotInputs], out: Tensor, state: Tensor, reads: Tensor | None) -> Tensor:
        assert reads is not None
        found, _, weights = problem.implementation.attend(problem, state)
        reads.copy_(weights)
        return out.copy_(found)

    def backward(
        self, problem: Problem[SlotInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None,
        reads: Tensor | None = None,
    ) -> tuple[Tensors, Tensor]:  # fmt: skip
        if reads is None or not hasattr(problem.implementation, "backward"):
            return super().backward(problem, dout, dfinal_state, initial_state)
        return problem.implementation.backward(problem, dout, dfinal_state, initial_state, reads)

    def summarize_backward(
        self, problem: Problem[SlotInputs], dout: Tensor, initial_state: Tensor | None, reads: Tensor | None
    ) -> Tensor:
        if reads is None or not hasattr(problem.implementation, "summarize_backward"):
            return super().summarize_backward(problem, dout, initial_state, reads)
        return problem.implementation.summarize_backward(problem, dout, initial_state, reads)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entering: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax over M slots per head, into which each token's key and value enter in parts.

        K_t = diag(e^{g_t}) K_{t-1} + s_tᵀ k_t        V_t = diag(e^{g_t}) V_{t-1} + s_tᵀ v_t
        out_t = softmax(scale q_t K_tᵀ) V_t

    q, k `[B, T, H, K]`, v `[B, T, H, V]`; entering s and `log_decay` g, never positive, `[B, T, H, M]`. `scale=None` is
    K^(-1/2). `documents` (default: each row one document) reset the state at their starts; padding gives 0.
    `initial_state` `[B, H, M, K + V]` = (K, V) enters only rows whose first token continues a document; without
    `documents` it enters every row. Returns out in q's type and the state after each row's last token in float32
    (float64 for float64), in which all is computed too. Every tensor gets its gradient. Raises ValueError for shapes
    that do not fit, a positive decay, or a backend that cannot run.

    Peng et al., 2022, "ABC", arXiv 2110.02488; Zhang et al., 2024, "Gated Slot Attention", arXiv 2409.07146.
    """
    inputs = SlotInputs(q, k, v, entering, log_decay)
    return SlotRecurrence(scale)(inputs, initial_state, documents, backend)


def flops(tokens: int, *, heads: int, key_dim: int, slots: int, value_dim: int) -> int:
    """Floating-point operations of a forward pass: one of gated linear attention for keys, and one for values."""
    keys = gated_linear.flops(tokens, heads=heads, key_dim=key_dim, value_dim=slots)
    return keys + gated_linear.flops(tokens, heads=heads, key_dim=slots, value_dim=value_dim)
