"""Log-linear attention: a decaying memory in levels, of ever more tokens further back, each read with its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gated_linear
from ..documents import Documents
from ..problem import Problem, per_row
from ..recurrence import Beginning, Recurrence, Summary
from .levels import level_between, merge_matrix, positions_of_ends

CHUNK = 64


class LogLinearInputs(NamedTuple):
    """Tensors of a call; `level_weights` are what a token reads each level with."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    level_weights: Tensor


@dataclass(frozen=True)
class LogLinearRecurrence(Recurrence[LogLinearInputs]):
    """The recurrence of log-linear attention, whose state is a memory for each level.

    From one position to a later one all levels up to that between both merge into it, and the others stay: so a
    transition is a matrix over levels, of the row's decay where a level goes to another, known from positions.
    """

    scale: float | None = None

    name = "log_linear_attention"
    record = LogLinearInputs
    dims = {"q": "B T G K", "k": "B T G K", "v": "B T H V", "log_decay": "B T H", "level_weights": "B T H L"}
    out, state = "B T H V", "B H L K V"

    def transition_dims(self, inputs: LogLinearInputs) -> str:
        return "B H L L"

    def begin(self, problem: Problem[LogLinearInputs]) -> Beginning:
        out, final = problem.implementation.forward(problem, None)
        return Beginning(out, Summary(self.transition(problem), final), None)

    def transition(self, problem: Problem[LogLinearInputs]) -> Tensor:
        """`[B, H, L, L]`; 0 unless one document goes through the row."""
        first, last = problem.documents.on(problem.device, positions_of_ends).unbind(1)
        levels = problem.inputs.level_weights.shape[3]
        merged = merge_matrix(level_between(first - 1, last, levels), levels, problem.dtype)
        decay = problem.inputs.log_decay.sum(1, dtype=torch.float64).exp().to(problem.dtype)
        return torch.where(per_row(problem.through, merged), merged, 0.0)[:, None] * decay[..., None, None]

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(later.transition @ earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition state + the summary's own."""
        return summary.state + over_levels(summary.transition, state)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transitionᵀ dstate + local."""
        return local + over_levels(summary.transition.mT, dstate)

    def combine_backward(self, earlier: Summary, later: Summary) -> Summary:
        return Summary(later.transition @ earlier.transition, self.retreat(earlier, later.state, earlier.state))


def over_levels(matrix: Tensor, state: Tensor) -> Tensor:
    """A matrix `[B, H, M, L]` times the levels of a state `[B, H, L, K, V]`."""
    return (matrix @ state.flatten(3)).unflatten(3, state.shape[3:])


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_weights: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention that reads what is further back with weights of its own, level by level.

        S_t^(l) = sum of e^{g_{s+1} + … + g_t} k_sᵀ v_s over the tokens s of level l seen from t
        out_t = scale q_t sum_l w_t^(l) S_t^(l)

    Levels follow from positions in the document: 0 is the token itself, and s is of the level of the highest bit in
    which the numbers s and t differ, 1 being the lowest bit. So seen from t, level l holds 2^(l-1) tokens or none, and
    after each token the lowest levels merge into the next one. The last of the L levels holds besides what is further
    back still: documents of up to 2^(L-1) tokens have every level, and longer ones a memory of the same size.

    q, k `[B, T, H, K]`, or of G groups where G divides H; v `[B, T, H, V]`; `log_decay` g `[B, T, H]`, never positive;
    `level_weights` w `[B, T, H, L]`. `scale=None` is K^(-1/2). `documents` (default: each row one document) reset the
    state at their starts; padding gives 0. `initial_state` `[B, H, L, K, V]` enters only rows whose first token
    continues a document, and is 0 in levels that are empty at the token before; it comes with `documents`, which say
    the position. Returns out in q's type and the state after each row's last token in float32 (float64 for float64),
    in which all is computed too. Every tensor gets its gradient. Raises ValueError for shapes that do not fit, a
    positive decay, an initial state without documents, or a backend that cannot run.

    Guo et al., 2025, "Log-Linear Attention", arXiv 2506.04761.
    """
    if initial_state is not None and documents is None:
        raise ValueError(
            "documents must come with an initial_state; got None. Levels follow from positions: pass "
            "Documents.whole(batch, length, position)"
        )
    inputs = LogLinearInputs(q, k, v, log_decay, level_weights)
    return LogLinearRecurrence(scale)(inputs, initial_state, documents, backend)


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, levels: int) -> int:
    """Floating-point operations of a forward pass in chunks: each level is a memory that is written and read."""
    sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    return gated_linear.flops(tokens, **sizes, chunk=CHUNK) + 4 * tokens * heads * (levels - 1) * key_dim * value_dim
