"""The loss by position at both sides of the borders of a staged run: 512, 2,048, then 8,192 tokens.

    python benchmarks/learning/stages.py [--run runs/stages] [--write] [SETTING=VALUE …]

Trains `experiment=stdlib_512_to_8192`, one process on one core, unless the run in that folder is finished; settings at
the end, such as trainer.seed=1, change it. Any other finished run that has `stages` and `evaluation.positions=true` can
be shown too. `--write` keeps table and curves in docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from longreach.benchmarks.machine import replace

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKERS = ("<!-- table: made by benchmarks/learning/stages.py -->", "<!-- end of the table -->")
PICTURE = "![Held-out loss by position at both sides of the borders](stages.png)"
EXPERIMENT = ("experiment=stdlib_512_to_8192", "logger.wandb.mode=disabled")
BUCKET = re.compile(r"validation_loss_at_(\d+)_to_(\d+)")

Bucket = tuple[int, int]  # the first and the last position


class Moment(NamedTuple):
    """A validation: in which stage, before its first step or after its last one, and what was lost where."""

    stage: str
    number: int  # of the stage
    begins: bool
    loss: float
    buckets: dict[Bucket, float]

    @property
    def label(self) -> str:
        return f"{self.stage}: {'before its first' if self.begins else 'after its last'} step"


def records(run: Path) -> list[dict[str, Any]]:
    """The validations that told positions, in their order."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if any(map(BUCKET.fullmatch, line))]


def is_finished(run: Path) -> bool:
    found, config = records(run), run / "config.yaml"
    return bool(found) and found[-1]["step"] == yaml.safe_load(config.read_text())["trainer"]["steps"]


def train(run: Path, more: list[str]) -> None:
    """The run; goes on where it stopped."""
    command = [sys.executable, "-m", "longreach.launch.train", *EXPERIMENT, f"run.dir={run}", *more]
    subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONSAFEPATH": "1"}, check=True)


def moments(found: list[dict[str, Any]]) -> list[Moment]:
    """Of each stage its last validation, and of all but the first of them that before their first step."""
    made: list[Moment] = []
    for number, stage in enumerate(dict.fromkeys(record["stage"] for record in found)):
        own = [record for record in found if record["stage"] == stage]
        for begins, record in ((True, own[0]), (False, own[-1])):
            if number or not begins:
                buckets = {(int(m[1]), int(m[2])): record[m[0]] for m in map(BUCKET.fullmatch, record) if m}
                made.append(Moment(stage, number, begins, record["validation_loss"], buckets))
    return made


def table(chosen: list[Moment]) -> str:
    """Loss by position, a column for each moment."""
    lines = ["| position | " + " | ".join(moment.label for moment in chosen) + " |", "|---" * (len(chosen) + 1) + "|"]

    def line(name: str, losses: list[float | None]) -> str:
        return f"| {name} | " + " | ".join("" if loss is None else f"{loss:.3f}" for loss in losses) + " |"

    for first, last in sorted({bucket for moment in chosen for bucket in moment.buckets}):
        lines.append(line(f"{first:,} to {last:,}", [moment.buckets.get((first, last)) for moment in chosen]))
    lines.append(line("all", [moment.loss for moment in chosen]))
    return "\n".join(lines)


def draw(chosen: list[Moment]) -> Figure:
    """Loss over position: a colour for each stage, dashed before its first step."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for moment in chosen:
        buckets = sorted(moment.buckets)
        axes.plot(
            [(first + last + 1) / 2 for first, last in buckets],
            [moment.buckets[bucket] for bucket in buckets],
            color=f"C{moment.number}",
            linestyle="--" if moment.begins else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if moment.begins else None,
            label=moment.label,
        )
        axes.axvline(buckets[-1][1] + 1, color=f"C{moment.number}", linewidth=1, linestyle=":", zorder=0)
    ends = sorted({last + 1 for moment in chosen for _, last in moment.buckets})
    axes.set_xticks(ends, [f"{end:,}" for end in ends], fontsize="small")
    axes.minorticks_off()
    axes.set(xlabel="position in the document (dotted: length of the stage's rows)", ylabel="held-out loss per token")
    axes.grid(alpha=0.25)
    axes.legend(title="stage", fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/stages"))
    parser.add_argument("--write", action="store_true")
    given, more = parser.parse_known_args()
    run = given.run.resolve()
    if not is_finished(run):
        train(run, more)
    chosen = moments(records(run))
    text = table(chosen)
    print(text)
    if given.write:
        replace(DOCS / "stages.md", MARKERS, f"{text}\n\n{PICTURE}")
        draw(chosen).savefig(DOCS / "stages.png", dpi=120)


if __name__ == "__main__":
    main()
