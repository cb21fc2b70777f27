"""Plots: the loss curves as PNG, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_loss(records: Iterable[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draws training and validation loss over the steps of `records` (lines of metrics.jsonl) into `path`."""
    records = list(records)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.35, linewidth=0.8)
        axes.plot(*zip(*smoothed(training), strict=True), color="tab:blue", linewidth=1.8, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.25)
    if training or validation:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Running mean over a fortieth of the points, exponentially weighted and without the pull of the first one."""
    keep = 1 - 1 / max(1, len(points) / 40)
    out, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out
