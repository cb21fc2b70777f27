"""Muon beside AdamW on the quickstart's model and data: the same rows in the same order, from the same weights.

    python benchmarks/learning/optimizers.py [--runs runs/optimizers] [--steps 100] [--share 0.75] [--write]
                                            [SETTING=VALUE …]

AdamW takes `steps` steps of two rows, at the rate that the quickstart had with it and at those beside, and Muon `share`
of them, each with its own decay in its last fifth, so that the ends compare. One process runs each; settings at the
end, such as data.sequence_length=2048, change all. Runs that are finished in the folder are not run again. `--write`
keeps table and curves in docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from longreach.benchmarks.machine import replace

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKERS = ("<!-- table: made by benchmarks/learning/optimizers.py -->", "<!-- end of the table -->")
COMMON = (
    "experiment=quickstart", "parallel.sequence=1", "data.rows_per_step=2", "evaluation.rows=16", "evaluation.every=15",
    "evaluation.context=null", "evaluation.baselines=false", "evaluation.sample_tokens=0", "checkpoint.every=0",
    "schedule.decay_steps=null", "logger.wandb.mode=disabled",
)  # fmt: skip
PICTURE = "![Held-out loss by step](optimizers.png)"


class Tried(NamedTuple):
    """An optimizer and how it is set."""

    kind: str
    rate: float
    momentum: float | None = None

    @property
    def label(self) -> str:
        """As table and figure name it."""
        return "AdamW" if self.kind == "adamw" else f"Muon, momentum {self.momentum}; AdamW for the rest"


GOAL = Tried("adamw", 3e-3)
TRIED = (GOAL, Tried("adamw", 2e-3), Tried("adamw", 5e-3), Tried("muon", 1e-2, 0.8))


class Curve(NamedTuple):
    """Held-out losses and those of the steps, by step."""

    held_out: list[tuple[int, float]]
    training: list[tuple[int, float]]


def curve(run: Path) -> Curve:
    """What metrics.jsonl says of a run."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    held_out = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    return Curve(held_out, training)


def train(tried: Tried, steps: int, runs: Path, more: list[str]) -> Curve:
    """The run of an optimizer; trains it unless it is there."""
    run = runs / f"{tried.kind}-{tried.rate:g}-{steps}"
    if (found := curve(run)).held_out and found.held_out[-1][0] == steps:
        return found
    chosen = [*COMMON, f"optimizer={tried.kind}", f"optimizer.learning_rate={tried.rate}", f"trainer.steps={steps}"]
    chosen += [f"optimizer.momentum={'null' if tried.momentum is None else tried.momentum}", f"run.dir={run}", *more]
    last = {override.partition("=")[0]: override for override in chosen}  # the last of each
    command = [sys.executable, "-m", "longreach.launch.train", *last.values()]
    subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=True)
    return curve(run)


def table(curves: dict[Tried, tuple[int, Curve]]) -> str:
    """Loss by optimizer, and the step at which each is first seen below the goal's last."""
    goal = curves[GOAL][1].held_out[-1][1]
    lines = [
        f"| optimizer | learning rate | steps | held-out loss | below {goal:.4f} at step |",
        "|---|---|---|---|---|",
    ]
    for tried, (steps, found) in curves.items():
        met = next((f"{step}" for step, loss in found.held_out if loss <= goal), "never")
        lines.append(f"| {tried.label} | {tried.rate:g} | {steps} | {found.held_out[-1][1]:.4f} | {met} |")
    return "\n".join(lines)


def draw(curves: dict[Tried, tuple[int, Curve]], file: Path) -> None:
    """Held-out loss over steps, and the loss of the steps behind it."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (tried, (_, found)) in enumerate(curves.items()):
        if tried.kind == "muon" or tried == GOAL:
            axes.plot(*zip(*found.training, strict=True), color=f"C{number}", alpha=0.25, linewidth=1)
        label = f"{tried.label}, {tried.rate:g}"
        axes.plot(*zip(*found.held_out, strict=True), color=f"C{number}", marker="o", label=label)
    goal = curves[GOAL][1].held_out[-1][1]
    axes.axhline(goal, color="grey", linewidth=1, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (held out: with marks)")
    axes.set_ylim(goal - 0.3, goal + 2.0)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--write", action="store_true")
    given, more = parser.parse_known_args()
    curves = {}
    for tried in TRIED:
        steps = given.steps if tried.kind == "adamw" else round(given.share * given.steps)
        curves[tried] = steps, train(tried, steps, given.runs, more)
    text = table(curves)
    print(text)
    if given.write:
        replace(DOCS / "optimizers.md", MARKERS, f"{text}\n\n{PICTURE}")
        draw(curves, DOCS / "optimizers.png")


if __name__ == "__main__":
    main()
