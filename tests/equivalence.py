"""The first promise: ranks, layouts and ZeRO stages change no loss and no gradient norm.

`python tests/equivalence.py` trains the same model on the same data under every topology, from the overrides that users
write, and writes `docs/equivalence.md`. `tests/trainer/test_equivalence.py` checks a choice of the same topologies.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from distributed import run_ranks

from longreach.launch.build import build
from longreach.launch.train import to_settings
from longreach.parallel.mesh import Mesh
from longreach.trainer.ranks.settings import ulysses_ranks
from longreach.trainer.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-6
STEPS = 10
SETTINGS = (
    "model=minimax_01_tiny",
    "data=stdlib",
    "data.tokenizer=bytes",
    "data.sequence_length=1024",
    "data.rows_per_step=2",
    "data.rows_per_micro_batch=1",
    "schedule.warmup_steps=2",
    f"trainer.steps={STEPS}",
    "trainer.dtype=float32",
    "trainer.seed=7",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "checkpoint.every=0",
    "logger.wandb.mode=disabled",
    "logger.memory=false",
)


@dataclass(frozen=True)
class Topology:
    """Processes, how many of them share a row, in which layout, and the ZeRO stage."""

    processes: int = 1
    sequence: int = 1
    layout: str = "contiguous"
    zero: int = 0

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.sequence={self.sequence}",
            f"parallel.layout={self.layout}",
            f"engine.zero_stage={self.zero}",
        ]

    def __str__(self) -> str:
        layout = f" {self.layout}" if self.sequence > 1 else ""
        return f"data {self.processes // self.sequence} × sequence {self.sequence}{layout}, ZeRO-{self.zero}"


SHAPES = [(1, 1, "contiguous")] + [
    (processes, sequence, layout)
    for processes, sequence in ((2, 2), (4, 4), (4, 2))
    for layout in ("contiguous", "zigzag")
]
EVERY = [Topology(*shape, zero) for shape in SHAPES for zero in range(4)]


def train(topology: Topology, folder: Path, *changes: str) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl of one run under a topology, with other settings than SETTINGS."""
    run_dir = folder / "-".join(map(str, (topology.processes, topology.sequence, topology.layout, topology.zero)))
    given = [*SETTINGS, *topology.overrides, f"run.dir={run_dir}", *changes]
    overrides = list({setting.partition("=")[0]: setting for setting in given}.values())
    run_ranks(topology.processes, train_on_rank, overrides, timeout=300)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def train_on_rank(rank: int, world: int, overrides: list[str]) -> None:
    """What `python -m longreach.launch.train` does with these overrides once the ranks have met."""
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        settings = to_settings(hydra.compose("train", overrides), overrides, {})
    mesh = Mesh.create(settings.parallel.sequence, ulysses_ranks(settings.parallel))
    Trainer(settings, build, mesh, torch.device("cpu"), ["train"]).run()


def differences(run: list[dict[str, float]], base: list[dict[str, float]]) -> tuple[float, float]:
    """Worst relative difference of loss and of gradient norm over the steps of two runs."""
    assert [line["step"] for line in run] == [line["step"] for line in base] == list(range(1, STEPS + 1))
    worst = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(run, base, strict=True))
        for key in ("loss", "grad_norm")
    }
    return worst["loss"], worst["grad_norm"]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = train(EVERY[0], Path(folder))
        for topology in EVERY[1:]:
            loss, norm = differences(train(topology, Path(folder)), base)
            holds = loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE
            rows.append(f"| {topology} | {loss:.1e} | {norm:.1e} | {'yes' if holds else '**no**'} |")
            print(rows[-1], flush=True)
    page = [
        "# Same loss, same gradients, whatever the topology",
        "",
        f"Each row trains `minimax_01_tiny` for {STEPS} steps on the same global batches under another topology, and",
        "gives the worst relative difference over those steps from one process with ZeRO-0. Losses must agree to",
        f"{LOSS_TOLERANCE:g}, gradient norms (of 3.9 million numbers, before clipping) to {NORM_TOLERANCE:g}. float32, "
        "gloo, CPU.",
        "Made by `python tests/equivalence.py`.",
        "",
        "Settings: `" + " ".join(SETTINGS) + "`",
        "",
        "Losses of the first and last step on one process: "
        f"{base[0]['loss']:.6f} and {base[-1]['loss']:.6f}; gradient norms {base[0]['grad_norm']:.6f} and "
        f"{base[-1]['grad_norm']:.6f}.",
        "",
        "| topology | loss | gradient norm | agrees |",
        "|---|---|---|---|",
        *rows,
    ]
    (ROOT / "docs" / "equivalence.md").write_text("\n".join(page) + "\n")
    if any("**no**" in row for row in rows):
        sys.exit("some topologies differ: see docs/equivalence.md")


if __name__ == "__main__":
    main()
