"""Mixtures of experts on a CPU: the grouped product beside one dense product of as many FLOPs, and the experts' load.

    python benchmarks/layers/experts.py [--rows 8192] [--width 512] [--hidden 1024] [--experts 8] [--threads 1]
    python benchmarks/layers/experts.py --load [--steps 150] [--runs runs/experts] [--write]

The first prints times of the processors, in float32, forward and with both gradients; the lowest of several rounds, in
which the two take turns. The second trains a small model without balancing, with the balancing loss and with the bias,
and draws the busiest expert's part of all choices by step; `--write` keeps the figure in docs/. Runs that are finished
are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from longreach.kernels.grouped_matmul import grouped_matmul

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROUNDS = 9
BALANCING = {
    "without balancing": ("balance=0", "bias_rate=0"),
    "balancing loss, weight 0.01": ("balance=0.01", "bias_rate=0"),
    "bias, rate 0.01": ("balance=0", "bias_rate=0.01"),
}
COMMON = (
    "model=mixtral_tiny", "model.depth=2", "model.width=128", "model.mixers.softmax.heads=4", "model.feed_forward.z=0",
    "data.tokenizer=bytes", "data.sequence_length=512", "data.rows_per_step=8", "data.rows_per_micro_batch=8",
    "optimizer.learning_rate=2e-3", "evaluation.every=0", "evaluation.sample_tokens=0", "checkpoint.every=0",
    "logger.wandb.mode=disabled",
)  # fmt: skip


def fastest(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of processors for each function, which take turns; what else the machine does counts little."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            started = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - started)
    return best


def products(rows: int, width: int, hidden: int, experts: int) -> None:
    """Prints the times of both products, with uneven groups."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(experts, generator=generator).softmax(0)
    ends = (shares.cumsum(0) * rows).round().int()
    ends[-1] = rows
    x, dout = torch.randn(rows, width, requires_grad=True), torch.randn(rows, hidden)
    weight = torch.randn(experts, hidden, width, requires_grad=True)
    one = torch.randn(hidden, width, requires_grad=True)

    def dense() -> torch.Tensor:
        return x @ one.T

    def grouped() -> torch.Tensor:
        return grouped_matmul(x, weight, ends)

    forward = fastest({"dense": dense, "grouped": grouped})
    both = fastest(
        {
            "dense": lambda: torch.autograd.grad(dense(), (x, one), dout),
            "grouped": lambda: torch.autograd.grad(grouped(), (x, weight), dout),
        }
    )
    print(f"{rows} rows, {width} x {hidden}, {experts} experts, {torch.get_num_threads()} thread(s)")
    for what, times in (("forward", forward), ("with gradients", both)):
        ratio = times["grouped"] / times["dense"]
        print(f"{what:15} dense {times['dense'] * 1e3:.1f} ms, grouped {times['grouped'] * 1e3:.1f} ms: {ratio:.2f}x")


def load_of(name: str, steps: int, runs: Path) -> list[tuple[int, float]]:
    """(step, busiest expert's part of all choices) of a run, which is made unless it is there."""
    run = runs / name.split(",")[0].replace(" ", "_")
    file = run / "metrics.jsonl"

    def curve() -> list[tuple[int, float]]:
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(record["step"], record["busiest_expert"]) for record in records if "busiest_expert" in record]

    if not (points := curve()) or points[-1][0] < steps:
        chosen = [f"++model.feed_forward.{setting}" for setting in BALANCING[name]]
        command = [sys.executable, "-m", "longreach.launch.train", *COMMON, *chosen]
        command += [f"trainer.steps={steps}", f"run.dir={run}", f"data.cache_dir={runs / 'cache'}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    return curve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 8192), ("width", 512), ("hidden", 1024), ("experts", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=Path, default=Path("runs/experts"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.load:
        products(arguments.rows, arguments.width, arguments.hidden, arguments.experts)
        return
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in BALANCING:
        points = load_of(name, arguments.steps, arguments.runs.resolve())
        axes.plot(*zip(*points, strict=True), label=name)
        print(f"{name:30} {points[-1][1]:.3f}")
    axes.axhline(1 / 8, color="grey", linestyle=":", label="even load")
    axes.set(xlabel="step", ylabel="busiest expert's part of all choices", title="8 experts, 2 per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend()
    if arguments.write:
        figure.savefig(DOCS / "experts.png", dpi=110)
        print(f"written to {DOCS / 'experts.png'}")


if __name__ == "__main__":
    main()
