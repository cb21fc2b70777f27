"""Guard: which steps must leave the weights alone, decided on the device, so that the host need not wait for a loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from ..ranks.exchange import gather

WINDOW = 128  # losses that a spike is measured by, unless trainer.spike_window says so


class Guard:
    """Turns the gradient of a step that must be skipped into NaN.

    The optimizer takes no step by a gradient that is not finite, at any ZeRO stage and on all ranks alike, since it
    looks at the norm over all of them: so a loss that is not finite, or is a spike, is skipped by the same means and in
    the same place as such a gradient, and nothing else waits for it.

    A spike is a step's loss above mean + `deviations` * standard deviation of those of the last `window` steps that
    were taken; before there are so many, and with 0 deviations, there is none.
    """

    def __init__(self, deviations: float, window: int | None, mesh: Mesh, device: torch.device) -> None:
        self.deviations, self._mesh = deviations, mesh
        self._losses = torch.zeros(window or WINDOW if deviations else 0, dtype=torch.float64, device=device)
        self._count = 0  # of losses, those that have made way included
        self._loss = self._limit = torch.full((), math.inf, dtype=torch.float64, device=device)

    def checked(
        self, loss: Tensor, auxiliary: Tensor | None, total: Tensor | None, targets: float
    ) -> tuple[Tensor, Tensor | None]:
        """The losses of a micro-batch, times 1, or times NaN where its step must be skipped.

        total: at the step's last micro-batch, this rank's sum over all of its token losses; else None. targets: of the
        step.
        """
        factor = loss.detach() * 0 + 1
        if total is not None and self.deviations:
            factor = factor * self._spike(total, targets)
        return loss * factor, None if auxiliary is None else auxiliary * factor

    def _spike(self, total: Tensor, targets: float) -> Tensor:
        self._loss = gather(total.unsqueeze(0), self._mesh).sum() / targets
        if self._count < len(self._losses):
            self._limit = torch.full_like(self._limit, math.inf)
        else:
            self._limit = self._losses.mean() + self.deviations * self._losses.std()
        return torch.where(self._loss > self._limit, math.nan, 1.0)

    def taken(self) -> None:
        """The step was taken: its loss is what later ones are measured by."""
        if self.deviations:
            self._losses[self._count % len(self._losses)] = self._loss
            self._count += 1

    def spike(self) -> tuple[float, float] | None:
        """The last step's loss, and the limit that it exceeds; None if it is no spike. Waits for the device."""
        loss, limit = float(self._loss), float(self._limit)
        return (loss, limit) if self.deviations and loss > limit else None

    def forget(self) -> None:
        """Begins to measure anew, where other losses are to be expected from here on."""
        self._count = 0

    def state(self) -> dict[str, Any]:
        """What decides alike when the run goes on: numbers of JSON."""
        return {"losses": self._losses.tolist(), "count": self._count} if self.deviations else {}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state; from none, or that of another window, it begins to measure anew."""
        self._count = 0
        if len(state.get("losses", ())) == len(self._losses):
            self._losses.copy_(torch.tensor(state.get("losses", ()), dtype=torch.float64))
            self._count = int(state.get("count", 0))
