"""Records: the numbers of steps that nobody has read yet, and the lines of metrics that they become."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.packing import Part
from .metrics import Work


@dataclass(frozen=True)
class TakenStep:
    """A step whose results are still on the device.

    step, tokens: steps taken and tokens read, with this one.       rate: its learning rate.
    losses: float64 `[ranks, 3 + sources]`, each rank's sum of token losses, those of each source of a mixture in
    micro-batches of it alone, the seconds that it has waited for others, and the most memory in bytes that it has used.
    norm: of the gradient, on the device or, where the optimizer has read it, a float.
    auxiliary: scalars, the auxiliary losses by name.                work: of the whole global batch.
    statistics: scalars that parts show of what they sum up, by name.
    sources: what the run has read of each source of a mixture. source_targets: those that its sum of losses is of.
    """

    step: int
    tokens: int
    rate: float
    losses: Tensor
    norm: Tensor | float
    auxiliary: dict[str, Tensor]
    work: Work
    statistics: dict[str, Tensor] = field(default_factory=dict)
    sources: list[Part] = field(default_factory=list)
    source_targets: list[float] = field(default_factory=list)

    @property
    def named(self) -> dict[str, Tensor]:
        """Auxiliary losses and statistics as metrics call them."""
        return {f"auxiliary_{name}": x for name, x in self.auxiliary.items()} | self.statistics


class Records:
    """Keeps the steps since the last `read`, which copies their numbers to the host all at once.

    peak: FLOPs per second that each rank's device has at most; None where it is not known.
    once: what the next line says besides.
    """

    def __init__(self, peak: float | None) -> None:
        self.peak, self.once = peak, dict[str, Any]()
        self._unread: list[TakenStep] = []
        self._seconds = 0.0

    @contextmanager
    def timing(self) -> Iterator[None]:
        """What runs within is part of a step, and its time counts."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def add(self, taken: TakenStep) -> None:
        """Adds a step; nothing waits for the device."""
        self._unread.append(taken)

    def read(self) -> list[dict[str, Any]]:
        """The lines of metrics of the steps since the last time, each with the mean of the time that they took and,
        over the ranks too, of what of it they waited for one another."""
        if not self._unread:
            return []
        steps, self._unread = self._unread, []
        with self.timing():
            numbers = _read([[step.losses, *_tensors(step.norm), *step.named.values()] for step in steps])
        seconds, self._seconds = self._seconds / len(steps), 0.0
        waited = sum(float(losses[:, -2].mean()) for losses, *_ in numbers) / len(steps)
        lines = [self._line(step, values, seconds, waited) for step, values in zip(steps, numbers, strict=True)]
        lines[0] |= self.once
        self.once = {}
        return lines

    def _line(self, taken: TakenStep, values: list[Tensor], seconds: float, waited: float) -> dict[str, Any]:
        losses, *scalars = values
        ranks, work = len(losses), taken.work
        norm = float(scalars.pop(0)) if isinstance(taken.norm, Tensor) else taken.norm
        flops = 3 * work.flops / seconds  # backward costs twice as much as forward; recomputation does not count
        line = {
            "step": taken.step,
            "tokens": taken.tokens,
            "loss": float(losses[:, 0].sum()) / work.targets,
            "grad_norm": norm,
            "learning_rate": taken.rate,
            "tokens_per_second": work.tokens / seconds,
            "peak_memory_bytes": int(losses[:, -1].max()),
            "seconds": seconds,
            "communication_seconds": waited,
            "flops_per_second": flops,
            "mfu": flops / ranks / self.peak if self.peak else None,
            "padding": work.padding,
            "attention_imbalance": work.imbalance,
        }
        line |= {name: float(x) for name, x in zip(taken.named, scalars, strict=True)}
        return line | _of_sources(taken, losses[:, 1:-2].sum(dim=0).tolist())


def _of_sources(taken: TakenStep, losses: list[float]) -> dict[str, Any]:
    """What has been read of each source so far, and its loss in this step where there was one."""
    line: dict[str, Any] = {}
    for part, targets, loss in zip(taken.sources, taken.source_targets, losses, strict=True):
        counts = {"rows": part.rows, "tokens": part.tokens, "epochs": part.epochs}
        counts |= {"loss": loss / targets} if targets else {}
        line |= {f"source_{part.name}_{name}": value for name, value in counts.items()}
    return line


def _tensors(value: Tensor | float) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else []


def _read(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    """The tensors on the host in float64, in one copy."""
    flat = torch.cat([x.double().flatten() for group in groups for x in group]).cpu()
    parts = iter(flat.split([x.numel() for group in groups for x in group]))
    return [[next(parts).view(x.shape) for x in group] for group in groups]
