"""Gated linear attention as a recurrence: its inputs, its variants, and what a row does to a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, per_row
from ..recurrence import Diagonal, Summary
from . import stable
from .normalise import Normalise

READS = ("inclusive", "exclusive")
NORMALISERS = (None, "sum", "at_least_one")


class GatedLinearInputs(NamedTuple):
    """Tensors of gated linear attention, see `gated_linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    value_log_decay: Tensor | None = None
    bonus: Tensor | None = None
    log_input: Tensor | None = None


@dataclass(frozen=True)
class GatedLinearRecurrence(Diagonal[GatedLinearInputs]):
    """The recurrence of gated linear attention.

    read, normaliser, scale: as for `gated_linear_attention`. stabilised: whether there is a `log_input`.

    With a normaliser, outputs are raw: `[B, T, H, V + 1]`, the last column what to divide by; stabilised
    `[B, T, H, V + 2]`, with the log scale that the others have been divided by. `finish` makes the op's output of them.
    States are `[B, H, K, V]`, with a normaliser `[B, H, K, V + 1]`, and stabilised with one row more,
    `[B, H, K + 1, V + 1]`, that holds their log scale: it is a unit, no variable, and carries no gradient; in the
    gradient of such a state it says which unit the gradient is for.
    """

    name = "gated_linear_attention"
    record = GatedLinearInputs
    dims = {
        "q": "B T G K",
        "k": "B T G K",
        "v": "B T H V",
        "log_decay": "H | H K | B T H | B T H K",
        "value_log_decay": "B T H V",
        "bonus": "H K",
        "log_input": "B T H",
    }

    read: str = "inclusive"
    normaliser: str | None = None
    stabilised: bool = False
    scale: float | None = None

    @property
    def raw(self) -> bool:
        return self.normaliser is not None

    @property
    def out(self) -> str:
        return f"B T H V+{self.raw + self.stabilised}"

    @property
    def state(self) -> str:
        return f"B H {'K+1' if self.stabilised else 'K'} {'V+1' if self.raw else 'V'}"

    def by_channel(self, inputs: GatedLinearInputs) -> bool:
        """Whether key or value channels have decays of their own."""
        log_decay = inputs.log_decay
        return inputs.value_log_decay is not None or (log_decay is not None and log_decay.dim() in (2, 4))

    def transition_dims(self, inputs: GatedLinearInputs) -> str:
        keys = "K" if inputs.log_decay is not None and inputs.log_decay.dim() in (2, 4) else "1"
        return f"B H {keys} {'1' if inputs.value_log_decay is None else 'V'}"

    def implementation(self, backend: str) -> Any:
        """`variants` runs what is not the plain recurrence, whatever the backend; the reference runs all."""
        plain = self.read == "inclusive" and not self.raw and not self.stabilised
        return super().implementation(backend if plain or backend == "reference" else "variants")

    def check_inputs(self, inputs: GatedLinearInputs) -> None:
        """Raises ValueError for settings that do not exist, and for variants that have no meaning together."""
        if self.read not in READS:
            raise ValueError(f"read must be one of {', '.join(READS)}; got {self.read!r}. Choose one")
        if self.normaliser not in NORMALISERS:
            names = ", ".join(map(str, NORMALISERS))
            raise ValueError(f"normaliser must be one of {names}; got {self.normaliser!r}. Choose one")
        if inputs.bonus is not None and self.read != "exclusive":
            raise ValueError(
                f"bonus must come with read='exclusive'; got {self.read!r}. An inclusive read has the token itself "
                "without one"
            )
        if self.raw and inputs.value_log_decay is not None:
            raise ValueError(
                f"normaliser must be None with a value_log_decay; got {self.normaliser!r}. The sum of what is read "
                "would be another one for each value channel"
            )
        if inputs.log_input is not None and (not self.raw or self.by_channel(inputs)):
            decay = None if inputs.log_decay is None else list(inputs.log_decay.shape)
            raise ValueError(
                "log_input must come with a normaliser and at most one decay per head; got normaliser="
                f"{self.normaliser!r} and log_decay {decay}. Without a divisor its exponentials overflow, and one "
                "scale keeps them only where channels decay alike"
            )

    def finish(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The op's output, in `dtype`, of a run's; differentiable."""
        if self.normaliser is None:
            return raw
        return Normalise.call(raw, self.normaliser, self.stabilised, dtype)

    def zero_state(self, like: Tensor) -> Tensor:
        """Zeros; a log scale as low as they come."""
        zeros = torch.zeros_like(like)
        if self.stabilised:
            zeros[:, :, -1] = stable.LOWEST
        return zeros

    def with_units(self, dstate: Tensor, state: Tensor) -> Tensor:
        return torch.cat([dstate[:, :, :-1], state[:, :, -1:]], dim=2) if self.stabilised else dstate

    def transition(self, problem: Problem[GatedLinearInputs]) -> Tensor:
        """e^{sum of the row's log decays}, `[B, H, 1 or K, 1 or V]`; 0 unless one document goes through.

        Stabilised, its logarithm `[B, H, 1, 1]`, −inf where the other is 0.
        """
        v, value_log_decay = problem.inputs.v, problem.inputs.value_log_decay
        total = _total(problem.inputs.log_decay, v).reshape(v.shape[0], v.shape[2], -1, 1)
        if value_log_decay is not None:
            total = total + _total(value_log_decay, v).reshape(v.shape[0], v.shape[2], 1, -1)
        through = per_row(problem.through, total)
        if self.stabilised:
            return torch.where(through, total, -torch.inf).to(problem.dtype)
        return torch.where(through, total.exp().to(problem.dtype), 0.0)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        if not self.stabilised:
            return super().combine(later, earlier)
        return Summary(later.transition + earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        if not self.stabilised:
            return super().advance(summary, state)
        return stable.advance(state, summary.transition, summary.state)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        if not self.stabilised:
            return super().retreat(summary, dstate, local)
        return stable.retreat(dstate, summary.transition, local)


def _total(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """The sum over tokens, in float64: `[B, H, …]`."""
    if log_decay is None:
        return v.new_zeros(v.shape[0], v.shape[2], dtype=torch.float64)
    if log_decay.dim() < 3:
        return (log_decay.double() * v.shape[1]).expand(v.shape[0], *log_decay.shape)
    return log_decay.sum(1, dtype=torch.float64)
