"""The selective scan: the recurrence of selective state space models, a vector of N states for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from ..problem import Problem, per_row
from ..recurrence import Diagonal, Summary

DECAYS = ("exponential", "longhorn")


class SelectiveInputs(NamedTuple):
    """Tensors of the selective scan, see `selective_scan`."""

    x: Tensor
    delta: Tensor
    a: Tensor | None
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class SelectiveRecurrence(Diagonal[SelectiveInputs]):
    """The recurrence of the selective scan.

    Of "exponential" only the sum of delta travels, `[B, D]` as transition of a summary: with it and a every rank has
    the decays, which `expand` makes of it; infinite where no part of the state before survives.
    """

    name = "selective_scan"
    record = SelectiveInputs
    dims = {"x": "B T D", "delta": "B T D", "a": "D N", "b": "B T N", "c": "B T N"}
    common = (3, 4)
    out, state = "B T D", "B D N"

    decay: str = "exponential"

    def transition_dims(self, inputs: SelectiveInputs) -> str:
        return "B D" if self.decay == "exponential" else "B D N"

    def check_inputs(self, inputs: SelectiveInputs) -> None:
        """Raises ValueError for a decay that does not exist, an a where there is to be none, or values out of range."""
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; got {self.decay!r}. Choose one")
        if (inputs.a is None) != (self.decay == "longhorn"):
            got = "none" if inputs.a is None else list(inputs.a.shape)
            raise ValueError(f"a must be given for decay='exponential' and only there; got {got}. Change one of them")
        if inputs.x.device.type == "cpu":
            self._check_values(inputs.delta.detach(), inputs.a, inputs.b.detach())

    def _check_values(self, delta: Tensor, a: Tensor | None, b: Tensor) -> None:
        if float(least := delta.min()) < 0:
            raise ValueError(f"delta must not be negative; got {float(least)}. Pass it through softplus, say")
        if a is not None:
            if float(greatest := a.detach().max()) > 0:
                raise ValueError(f"a must not be positive; got {float(greatest)}. Pass minus the rate of decay")
        elif float(greatest := (delta.amax(2).double() * b.abs().amax(2).double().square()).max()) > 1 + 1e-2:
            # What rounding to bfloat16 may add is let through.
            raise ValueError(f"delta b^2 must not exceed 1; got {float(greatest)}. Divide delta by 1 + delta |b|^2")

    def transition(self, problem: Problem[SelectiveInputs]) -> Tensor:
        """The sum of delta `[B, D]`, or Longhorn's decay over all tokens `[B, D, N]`."""
        if self.decay == "exponential":
            total = problem.inputs.delta.sum(1, dtype=torch.float64).to(problem.dtype)
            return torch.where(per_row(problem.through, total), total, torch.inf)
        if problem.backend == "reference":
            return super().transition(problem)
        total = problem.implementation.total_decay(problem)
        return torch.where(per_row(problem.through, total), total, 0.0)

    def expand(self, summary: Summary, inputs: SelectiveInputs) -> Summary:
        """The summary with the decays that its sum of delta stands for, `[B, D, N]`."""
        if inputs.a is None:
            return summary
        total = summary.transition.unsqueeze(-1)
        decay = (total * inputs.a.to(total.dtype)).exp()
        return Summary(torch.where(total == torch.inf, 0.0, decay), summary.state)  # whatever a is, 0 included


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    *,
    decay: str = "exponential",
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A state space model whose step, input and output depend on the token.

        h_t = e^{delta_t a} h_{t-1} + delta_t x_t b_t        y_t = sum_n h_t c_t        decay = "exponential"
        h_t = (1 - delta_t b_t^2) h_{t-1} + delta_t x_t b_t  y_t = sum_n h_t c_t        decay = "longhorn"

    for every channel d and state n. x and delta `[B, T, D]`, delta never negative; a `[D, N]`, never positive, and
    None for "longhorn", where delta_t b_t^2 must not exceed 1; b and c `[B, T, N]`, shared by the channels. `documents`
    (default: each row one document) reset the state at their starts; padding gives 0. `initial_state` `[B, D, N]`
    enters only rows whose first token continues a document (`documents.continues`); without `documents` it enters
    every row. Returns y `[B, T, D]` in x's type and the state after each row's last token `[B, D, N]` in float32
    (float64 for float64), in which all is computed too. Every tensor gets its gradient. No tensor of size T D N is ever
    held. Raises ValueError for shapes or values that do not fit, or a backend that cannot run.

    "exponential" is Mamba's (Gu and Dao, 2023, arXiv 2312.00752), whose input is scaled by delta and not by the exact
    integral. "longhorn" is the diagonal form in which Longhorn was released (Liu et al., 2024, arXiv 2407.14207).
    """
    return SelectiveRecurrence(decay)(SelectiveInputs(x, delta, a, b, c), initial_state, documents, backend)


def flops(tokens: int, *, channels: int, states: int) -> int:
    """Floating-point operations of a forward pass: 7 per token, channel and state, an exponential among them as 1."""
    return 7 * tokens * channels * states
