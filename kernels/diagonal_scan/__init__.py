"""The diagonal scan: the recurrence of gated linear units of state, h_t = e^{a_t} h_{t-1} + x_t."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from ..problem import Problem, per_row
from ..recurrence import Diagonal


class DiagonalInputs(NamedTuple):
    """Tensors of the diagonal scan with all dims of channels as one, see `flat_inputs`."""

    x: Tensor
    log_decay: Tensor


class DiagonalRecurrence(Diagonal[DiagonalInputs]):
    """The recurrence of the diagonal scan."""

    name = "diagonal_scan"
    record = DiagonalInputs
    dims = {"x": "B T D", "log_decay": "D | B T D"}
    out, state = "B T D", "B D"

    def transition(self, problem: Problem[DiagonalInputs]) -> Tensor:
        """e^{sum of the row's log decays}; 0 unless one document goes through."""
        x, log_decay = problem.inputs
        constant = log_decay.dim() == 1
        total = log_decay.double() * x.shape[1] if constant else log_decay.sum(1, dtype=torch.float64)
        total = total.expand(x.shape[0], -1)
        return torch.where(per_row(problem.through, total), total.exp().to(problem.dtype), 0.0)


def diagonal_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A decaying sum over time, channel by channel.

        h_t = e^{a_t} h_{t-1} + x_t        out_t = h_t

    x `[B, T, …]`, with any dims of channels; `log_decay` a, never positive: like x, or constant, with x's channels
    alone. `documents` (default: each row one document) reset the state at their starts; padding gives 0.
    `initial_state` `[B, …]` enters only rows whose first token continues a document (`documents.continues`); without
    `documents` it enters every row. Returns every h in x's type and the state after each row's last token `[B, …]` in
    float32 (float64 for float64), in which all is computed too. Every tensor gets its gradient. Raises ValueError for
    shapes that do not fit, a positive decay, or a backend that cannot run.

    As in HGRN (Qin et al., 2023, arXiv 2311.04823), whose x is (1 - e^a) times its input; the scan itself after
    Martin and Cundy, 2018, arXiv 1709.04057.
    """
    inputs = flat_inputs(x, log_decay)
    if initial_state is not None:
        if initial_state.shape != x[:, 0].shape:
            raise ValueError(
                f"initial_state must be [B, …] = {list(x[:, 0].shape)}; got {list(initial_state.shape)}. "
                "Pass the final state of the tokens before"
            )
        initial_state = initial_state.flatten(1)
    out, final = DiagonalRecurrence()(inputs, initial_state, documents, backend)
    return out.view(x.shape), final.view_as(x[:, 0])


def flat_inputs(x: Tensor, log_decay: Tensor) -> DiagonalInputs:
    """The inputs with all dims of channels as one. Raises ValueError for shapes that do not fit."""
    if x.dim() < 3:
        raise ValueError(f"x must be [B, T, …] with a dim of channels; got {list(x.shape)}. Put time in dimension 1")
    if log_decay.shape not in (x.shape, x.shape[2:]):
        raise ValueError(
            f"log_decay must be like x, {list(x.shape)}, or constant, {list(x.shape[2:])}; got "
            f"{list(log_decay.shape)}. Expand it to one of these"
        )
    return DiagonalInputs(x.flatten(2), log_decay.flatten(2) if log_decay.dim() == x.dim() else log_decay.flatten())


def flops(tokens: int, *, channels: int) -> int:
    """Floating-point operations of a forward pass: a product, a sum and an exponential per token and channel."""
    return 3 * tokens * channels
