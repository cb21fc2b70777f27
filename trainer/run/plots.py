"""Plots: the loss curves as PNG, without pyplot's global state."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2000  # of a curve at most, about two for each pixel across


class Point(NamedTuple):
    """Neighbouring steps of a curve as one: how many, the sums of their numbers and values, the extreme values."""

    size: int
    steps: int
    values: float
    least: float
    greatest: float

    @property
    def mean(self) -> tuple[float, float]:
        return self.steps / self.size, self.values / self.size


class Curve:
    """Values over steps in bounded memory: `points` are at most POINTS, each of equally many steps but for the last."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._each = 1  # steps of a point

    def add(self, step: int, value: float) -> None:
        new = Point(1, step, value, value, value)
        if self.points and self.points[-1].size < self._each:
            self.points[-1] = _joined(self.points[-1], new)
            return
        if len(self.points) == POINTS:
            self.points = [_joined(*pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self._each *= 2
        self.points.append(new)


def _joined(a: Point, b: Point) -> Point:
    least, greatest = min(a.least, b.least), max(a.greatest, b.greatest)
    return Point(a.size + b.size, a.steps + b.steps, a.values + b.values, least, greatest)


class LossCurves:
    """Training and validation loss of a run, taken from the lines of metrics.jsonl one by one."""

    def __init__(self) -> None:
        self.training, self.validation = Curve(), Curve()

    def add(self, record: dict[str, Any]) -> None:
        for curve, key in ((self.training, "loss"), (self.validation, "validation_loss")):
            value = record.get(key)
            if value is not None and math.isfinite(value):
                curve.add(record["step"], value)

    def draw(self, path: Path, title: str = "") -> None:
        """Draws both curves into `path`; a training loss that was high or low for one step only is seen too."""
        from matplotlib.figure import Figure  # takes long to import, and one rank draws

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        if self.training.points:
            means = [point.mean for point in self.training.points]
            extremes = [(p.mean[0], value) for p in self.training.points for value in (p.least, p.greatest)]
            axes.plot(*zip(*extremes, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8)
            axes.plot(*zip(*smoothed(means), strict=True), color="tab:blue", linewidth=1.8, label="training")
        if self.validation.points:
            means = [point.mean for point in self.validation.points]
            axes.plot(*zip(*means, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.25)
        if self.training.points or self.validation.points:
            axes.legend()
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, at once: a full disk leaves the one before. Makes its folder, not the folder of that."""
    path.parent.mkdir(exist_ok=True)  # but not the run's folder, should that have gone
    aside = path.with_name(f".{path.name}")
    try:
        figure.savefig(aside, dpi=150, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean over a fortieth of the points, exponentially weighted and without the pull of the first one."""
    keep = 1 - 1 / max(1, len(points) / 40)
    out, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out
