"""Maps of scores as PNG, without pyplot's global state: depth by length, task by length, task by checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..run.plots import save
from .suite import grouped

TITLES = {"accuracy": "greedy decoding", "choice": "likeliest choice"}
WRITTEN = 400  # cells of a map in which their values still can be read
BESIDE = 6  # columns of maps that still stand side by side


class Map(NamedTuple):
    """Shares by row and column; NaN where there is none."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]


def draw_task_maps(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """A map of depth by length for each task with depths, and one of all tasks by length."""
    depths = [line for line in lines if line["depth"] is not None]
    for label in dict.fromkeys(line["task"] for line in depths):
        own = [line for line in depths if line["task"] == label]
        _draw(_of_depths(label, own), folder / f"{label}.png", "tokens", "depth")
    _draw(_of_tasks(lines), folder / "tasks.png", "tokens", "")


def draw_checkpoint_map(scored: Sequence[tuple[str, Sequence[dict[str, Any]]]], file: Path) -> None:
    """A map of every task and length by checkpoint, named in the order of training."""
    names = list(dict.fromkeys((line["task"], line["length"]) for _, lines in scored for line in lines))
    maps = []
    for measure in _measures([line for _, lines in scored for line in lines]):
        means = [{key: _mean(group, measure) for key, group in grouped(lines).items()} for _, lines in scored]
        values = [[of.get(name, math.nan) for of in means] for name in names]
        rows = [f"{task}, {length}" for task, length in names]
        maps.append(Map(TITLES[measure], rows, [name for name, _ in scored], values))
    _draw(maps, file, "checkpoint", "")


def draw_positions(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss by position in long documents, a curve for each length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for length in sorted({line["length"] for line in lines}):
        own = [line for line in lines if line["length"] == length]
        axes.plot(
            [line["last"] + 1 for line in own], [line["loss"] for line in own], marker="o", label=f"{length} tokens"
        )
    axes.set(xlabel="position: up to so many tokens of the document", ylabel="loss (nats a token)")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
    axes.legend()
    save(figure, path)


def _of_depths(label: str, lines: Sequence[dict[str, Any]]) -> list[Map]:
    lengths, depths = (sorted({line[name] for line in lines}) for name in ("length", "depth"))
    found = {(line["depth"], line["length"]): line for line in lines}
    return [
        Map(
            f"{label}: {TITLES[measure]}",
            [f"{depth:.0%}" for depth in depths],
            [f"{length:,}" for length in lengths],
            [[_value(found.get((depth, length)), measure) for length in lengths] for depth in depths],
        )
        for measure in _measures(lines)
    ]


def _of_tasks(lines: Sequence[dict[str, Any]]) -> list[Map]:
    lengths, labels = sorted({line["length"] for line in lines}), list(dict.fromkeys(line["task"] for line in lines))
    groups = grouped(lines)
    return [
        Map(
            TITLES[measure],
            labels,
            [f"{length:,}" for length in lengths],
            [[_mean(groups.get((label, length), []), measure) for length in lengths] for label in labels],
        )
        for measure in _measures(lines)
    ]


def _measures(lines: Sequence[dict[str, Any]]) -> list[str]:
    return ["accuracy", *(["choice"] if any(line["choice"] is not None for line in lines) else [])]


def _mean(lines: Sequence[dict[str, Any]], measure: str) -> float:
    values = [_value(line, measure) for line in lines]
    return sum(values) / len(values) if values else math.nan


def _value(line: dict[str, Any] | None, measure: str) -> float:
    return math.nan if line is None or line[measure] is None else float(line[measure])


def _draw(maps: Sequence[Map], path: Path, across: str, down: str) -> None:
    """Maps side by side; wide ones one below the other."""
    from matplotlib.figure import Figure  # takes long to import, and one rank draws
    from matplotlib.ticker import PercentFormatter

    maps = [_with_values(each) for each in maps]
    columns, rows = len(maps[0].columns), [len(each.rows) for each in maps]
    beside = columns <= BESIDE
    names = 0.08 * max(len(row) for each in maps for row in each.rows)
    width = 1.5 + (sum(names + 0.6 + 0.75 * columns for _ in maps) if beside else names + 0.6 + 0.6 * columns)
    height = max(rows) * 0.42 + 1.2 if beside else sum(rows) * 0.42 + 1.2 * len(maps)
    figure = Figure(figsize=(max(4.5, width), max(2.2, height)), layout="constrained")
    if beside:
        panels = figure.subplots(1, len(maps), squeeze=False).flatten()
    else:
        panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=rows).flatten()
    for panel, each in zip(panels, maps, strict=True):
        panel.imshow(each.values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set(title=each.title, xlabel=across, ylabel=down)
        panel.set_xticks(range(columns), each.columns, rotation=45 if columns > 4 else 0, fontsize=8)
        panel.set_yticks(range(len(each.rows)), each.rows, fontsize=8)
        if len(each.rows) * columns <= WRITTEN:
            for y, values in enumerate(each.values):
                for x, value in enumerate(values):
                    if not math.isnan(value):
                        colour = "black" if value > 0.6 else "white"
                        panel.text(x, y, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=7)
    bar = figure.colorbar(panels[0].images[0], ax=list(panels), format=PercentFormatter(1), fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


def _with_values(each: Map) -> Map:
    """The map without rows that have no value at all: tasks without choices."""
    kept = [y for y, values in enumerate(each.values) if not all(map(math.isnan, values))]
    return each._replace(rows=[each.rows[y] for y in kept], values=[each.values[y] for y in kept]) if kept else each
