"""Mesa: queries that are solved against a decayed covariance of keys, before they read a decayed memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gated_linear
from ..documents import Documents
from ..problem import Problem, per_row
from ..recurrence import Beginning, Diagonal, Summary


class MesaInputs(NamedTuple):
    """Tensors of a call; `regulariser` is the diagonal that is added to the covariance of each head."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    regulariser: Tensor


@dataclass(frozen=True)
class MesaRecurrence(Diagonal[MesaInputs]):
    """The recurrence of MesaNet. Its state is both memories side by side, (k, v) being the values of one write.

    The state that enters changes what queries are solved to, not only what is added to outputs: so nothing is computed
    of these before it is known, and `correct` computes them all.
    """

    iterations: int = 30

    name = "mesa"
    record = MesaInputs
    dims = {
        "q": "B T H K", "k": "B T H K", "v": "B T H V", "log_decay": "B T H", "beta": "B T H", "regulariser": "H K",
    }  # fmt: skip
    out, state = "B T H V", "B H K K+V"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {self.iterations}. 30 is usual")

    def transition_dims(self, inputs: MesaInputs) -> str:
        return "B H 1 1"

    def begin(self, problem: Problem[MesaInputs]) -> Beginning:
        state = problem.implementation.final_state(problem)
        return Beginning(problem.new_output(), Summary(self.transition(problem), state), None)

    def transition(self, problem: Problem[MesaInputs]) -> Tensor:
        """e^{sum of the row's log decays} `[B, H, 1, 1]`; 0 unless one document goes through."""
        total = problem.inputs.log_decay.sum(1, dtype=torch.float64)[..., None, None]
        return torch.where(per_row(problem.through, total), total.exp().to(problem.dtype), 0.0)

    def correct(self, problem: Problem[MesaInputs], out: Tensor, state: Tensor, reads: Tensor | None) -> Tensor:
        return out.copy_(problem.implementation.forward(problem, state)[0])


def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    regulariser: Tensor,
    *,
    iterations: int = 30,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Reads of a linear memory by queries that solve a least-squares problem over all keys so far.

        H_t = e^{g_t} H_{t-1} + beta_t k_tᵀ k_t        S_t = e^{g_t} S_{t-1} + beta_t k_tᵀ v_t
        out_t = q_t (H_t + diag(regulariser))^{-1} S_t

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, `log_decay` g, never positive, and beta `[B, T, H]`; regulariser `[H, K]`,
    positive. Systems are solved by so many `iterations` of conjugate gradients, whose gradient is that of the solution,
    solved for by as many; "reference" solves exactly. `documents` (default: each row one document) reset the state at
    their starts; padding gives 0. `initial_state` `[B, H, K, K + V]` = (H, S) enters only rows whose first token
    continues a document; without `documents` it enters every row. Returns out in q's type and the state after each
    row's last token in float32 (float64 for float64), in which all is computed too. Every tensor gets its gradient.
    Raises ValueError for shapes that do not fit, or a backend that cannot run.

    von Oswald et al., 2025, "MesaNet", arXiv 2506.05233.
    """
    inputs = MesaInputs(q, k, v, log_decay, beta, regulariser)
    return MesaRecurrence(iterations)(inputs, initial_state, documents, backend)


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, iterations: int = 30) -> int:
    """Floating-point operations of a forward pass: each iteration and the last read are a pass over a memory."""
    sizes = {"heads": heads, "key_dim": key_dim}
    reads = gated_linear.flops(tokens, value_dim=key_dim, **sizes) - 2 * tokens * heads * key_dim**2
    return gated_linear.flops(tokens, value_dim=key_dim + value_dim, **sizes) + iterations * reads
