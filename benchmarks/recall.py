"""Multi-query associative recall (arXiv 2312.04927) at 2,048 tokens: sparse attention beside full, and beside a window.

    python benchmarks/recall.py [--runs runs/recall] [--models full nsa …] [--write]

Two layers each, of width 64 and with short convolutions, without rotary positions. Models learn the task in rows of 256
tokens with 16 pairs, and go on in rows of 2,048 with 64 pairs and queries anywhere, where a query attends to 8 blocks
of 32 keys that MoBA or NSA selects, or to a window of the 256 last ones. MoBA goes on from what full attention learned.
Runs that are finished in the folder are not run again. `--write` keeps table and curves in docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
STAGES = {
    256: (
        "data.recall.pairs=16", "data.rows_per_step=32", "data.rows_per_micro_batch=32", "trainer.steps=800",
        "evaluation.every=50",
    ),
    2048: (
        "data.recall.pairs=64", "data.recall.power=1.0", "data.rows_per_step=8", "data.rows_per_micro_batch=8",
        "trainer.steps=50", "evaluation.every=10", "optimizer.learning_rate=1e-4",
    ),
}  # fmt: skip
COMMON = (
    "data=recall", "model.width=64", "model.depth=2", "model.feed_forward.hidden=128", "+model.initial_std=0.1",
    "model.tied_embeddings=true", "data.vocabulary_size=256", "optimizer.learning_rate=3e-3", "evaluation.rows=32",
    "optimizer.weight_decay=0.01", "schedule.kind=wsd", "logger.wandb.mode=disabled",
)  # fmt: skip


def settings(mixer: str, heads: int = 1, **more: object) -> tuple[str, ...]:
    given = {"heads": heads, "kv_heads": 1, **more, "conv_size": 4, "rope_base": "null"}
    return tuple(f"++model.mixers.{mixer}.{name}={value}" for name, value in given.items())


BLOCKS = {"block_size": 4, "top_k": 64}
MODELS = {  # name: what it is, overrides, and whose first stage it goes on from
    "full": ("full attention", ("model=llama_tiny", *settings("softmax")), "full"),
    "window": ("window of 256", ("model=llama_tiny", *settings("softmax", window=256)), "window"),
    "nsa": (
        "NSA, 8 blocks of 32",
        ("model=nsa_tiny", *settings("nsa", 2, block_size=32, count=8, near=64, compression_hidden=32)),
        "nsa",
    ),
    "moba": (
        "MoBA, 64 blocks of 4",
        ("model=moba_tiny", "model.pattern=[moba]", "~model.mixers.softmax", *settings("moba", **BLOCKS)),
        "full",
    ),
}


def train(name: str, length: int, runs: Path) -> Path:
    """The run of a stage; trains it unless it is there, from the weights of the stage before."""
    first, last = STAGES
    name = MODELS[name][2] if length == first else name
    run = runs / f"{name}-{length}"
    if (run / "plots" / "loss.png").exists():
        return run
    overrides = [*COMMON, *MODELS[name][1], f"data.sequence_length={length}", f"run.dir={run}"]
    if length == last:
        overrides.append(f"init_from={runs / f'{MODELS[name][2]}-{first}'}")
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "longreach.launch.train", *overrides, *STAGES[length]]
    subprocess.run(command, env=environment, check=True)
    return run


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, accuracy) of held-out problems."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(record["step"], record["accuracy"]) for record in records if "accuracy" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(STAGES), sharey=True)
    lines = ["| | " + " | ".join(f"{length:,} tokens" for length in STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name in arguments.models:
        curves = [curve(train(name, length, runs)) for length in STAGES]
        for place, points in zip(axes, curves, strict=True):
            place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=MODELS[name][0])
        lines.append(f"| {MODELS[name][0]} | {' | '.join(f'{100 * points[-1][1]:.1f} %' for points in curves)} |")
    for place, (length, (pairs, *_)) in zip(axes, STAGES.items(), strict=True):
        place.set(xlabel="step", title=f"{length:,} tokens, {pairs.split('=')[1]} pairs", ylim=(-0.02, 1.02))
        place.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out problems")
    axes[0].legend()
    print("\n".join(lines))
    if arguments.write:
        figure.savefig(DOCS / "recall.png", dpi=110)
        (DOCS / "recall.md").write_text(
            "# Recall\n\n`python benchmarks/recall.py --write`: accuracy on held-out problems of multi-query "
            "associative recall, at the end of each stage. MoBA goes on from full attention's first stage.\n\n"
            + "\n".join([*lines, "", "![accuracy by step](recall.png)", ""])
        )
        print(f"written to {DOCS / 'recall.md'} and .png")


if __name__ == "__main__":
    main()
