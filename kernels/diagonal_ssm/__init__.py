"""The diagonal state space model: a convolution with sums of damped oscillations, as a recurrence of complex states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from ..problem import Problem, per_row
from ..recurrence import Diagonal, Summary

CHUNK = 128  # tokens of a chunk
GONE = -1000.0  # a log decay after which nothing is left, whose product with 0 is 0


class StateSpaceInputs(NamedTuple):
    """Tensors of the diagonal state space model, see `diagonal_ssm`."""

    x: Tensor
    log_decay: Tensor
    angle: Tensor
    real: Tensor
    imaginary: Tensor


class StateSpaceRecurrence(Diagonal[StateSpaceInputs]):
    """The recurrence of the diagonal state space model. States and transitions are complex, kept as pairs."""

    name = "diagonal_ssm"
    record = StateSpaceInputs
    dims = {"x": "B T H P", **dict.fromkeys(("log_decay", "angle", "real", "imaginary"), "H N")}
    out, state = "B T H P", "B H N P 2"

    def transition_dims(self, inputs: StateSpaceInputs) -> str:
        return "B H N 1 2"

    def transition(self, problem: Problem[StateSpaceInputs]) -> Tensor:
        """(e^{a + i theta})^T of rows that one document passes through, 0 of others."""
        x, log_decay, angle = problem.inputs[:3]
        total = as_pairs(*powers(log_decay, angle, torch.tensor(x.shape[1], device="cpu"), problem.dtype))
        total = total[None, :, :, None].expand(x.shape[0], -1, -1, -1, -1)
        return torch.where(per_row(problem.through, total), total, 0.0)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(product(later.transition, earlier.transition), self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        return summary.state + product(summary.transition, state)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        real, imaginary = summary.transition.unbind(-1)
        return local + product(as_pairs(real, -imaginary), dstate)


def diagonal_ssm(
    x: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    real: Tensor,
    imaginary: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A linear time-invariant state space model with N complex states per channel, none of which acts on another.

        h_t = e^{a + i theta} h_{t-1} + x_t        y_t = sum_n Re(c h_t)        c = real + i imaginary

    x `[B, T, H, P]`, P channels that share the model of their head; `log_decay` a, never positive, `angle` theta,
    `real` and `imaginary`: `[H, N]`. A factor of x before the state belongs in c. `documents` (default: each row one
    document) reset the state at their starts; padding gives 0. `initial_state` `[B, H, N, P, 2]` (real part, imaginary
    part) enters only rows whose first token continues a document (`documents.continues`); without `documents` it enters
    every row. Returns y `[B, T, H, P]` in x's type and the state after each row's last token in float32 (float64 for
    float64), in which all is computed too. Every tensor gets its gradient. No tensor of size T H N P is ever held.
    Raises ValueError for shapes that do not fit, a positive decay, or a backend that cannot run.

    S4D (Gu et al., 2022, arXiv 2206.11893). As a convolution, y_t = sum_s K_{t-s} x_s with
    K_s = sum_n Re(c e^{(a + i theta) s}).
    """
    inputs = StateSpaceInputs(x, log_decay, angle, real, imaginary)
    return StateSpaceRecurrence()(inputs, initial_state, documents, backend)


def powers(log_decay: Tensor, angle: Tensor, steps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of e^{(a + i theta) steps} `[H, N, *steps]`, computed in float64: angles grow large."""
    steps, place = steps.to(angle.device), (..., *[None] * steps.dim())
    turn = angle.double()[place] * steps
    size = (log_decay.double().clamp(min=GONE)[place] * steps).exp()
    return (size * turn.cos()).to(dtype), (size * turn.sin()).to(dtype)


def as_pairs(real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex numbers as `[..., 2]`."""
    return torch.stack([real, imaginary], dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers `[..., 2]`, which broadcast."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return as_pairs(ar * br - ai * bi, ar * bi + ai * br)


def flops(tokens: int, *, channels: int, states: int, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks: 2 C + 8 N per token and channel."""
    return tokens * channels * (2 * chunk + 8 * states)
