"""Multi-query associative recall (arXiv 2312.04927) at 2,048 tokens: sparse attention beside full, and beside a window.

    python benchmarks/recall.py [--runs runs/recall] [--mixers full window moba nsa] [--write]

Two layers each, of width 64 and with short convolutions, without rotary positions. Every model learns the task in rows
of 256 tokens with 16 pairs, and goes on in rows of 2,048 with 64, where a query attends to at most 192 keys selected
by MoBA or NSA, or to a window of the 192 last ones. Runs that are finished in the folder are not run again. `--write`
keeps table and curves in docs/.
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
STAGES = {  # tokens in a row: pairs, rows of a step, steps, steps between evaluations
    256: (16, 32, 800, 50),
    2048: (64, 8, 200, 25),
}
COMMON = (
    "data=recall", "model.width=64", "model.depth=2", "model.feed_forward.hidden=128", "+model.initial_std=0.1",
    "model.tied_embeddings=true", "data.vocabulary_size=256", "optimizer.learning_rate=3e-3",
    "optimizer.weight_decay=0.01", "schedule.kind=wsd", "logger.wandb.mode=disabled",
)  # fmt: skip


def settings(mixer: str, heads: int = 2, **more: object) -> tuple[str, ...]:
    given = {"kv_heads": heads, **more, "conv_size": 4, "rope_base": "null"}
    path = f"model.mixers.{mixer}"
    return (f"{path}.heads=2", *(f"++{path}.{name}={value}" for name, value in given.items()))


MODELS = {
    "full": ("full attention", ("model=llama_tiny", *settings("softmax"))),
    "window": ("window of 192", ("model=llama_tiny", *settings("softmax", window=192))),
    "moba": (
        "MoBA, 6 blocks of 32",
        ("model=moba_tiny", "model.pattern=[moba]", "~model.mixers.softmax", *settings("moba", block_size=32, top_k=6)),
    ),
    "nsa": (
        "NSA, 6 blocks of 32",
        ("model=nsa_tiny", *settings("nsa", heads=1, block_size=32, count=6, near=64, compression_hidden=32)),
    ),
}


def train(name: str, length: int, runs: Path) -> Path:
    """The run of a stage; trains it unless it is there, from the weights of the stage before."""
    run = runs / f"{name}-{length}"
    pairs, rows, steps, every = STAGES[length]
    if curve(run)[-1:] and curve(run)[-1][0] == steps:
        return run
    before = [runs / f"{name}-{shorter}" for shorter in STAGES if shorter < length]
    overrides = [
        *COMMON, *MODELS[name][1], f"run.dir={run}", f"data.sequence_length={length}", f"data.recall.pairs={pairs}",
        f"data.rows_per_step={rows}", f"data.rows_per_micro_batch={rows}", f"trainer.steps={steps}",
        f"evaluation.every={every}", f"evaluation.rows={max(rows, 16)}", f"checkpoint.every={steps}",
        *(f"init_from={folder}" for folder in before[-1:]),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-m", "longreach.launch.train", *overrides], env=environment, check=True)
    return run


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, accuracy) of held-out problems."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(record["step"], record["accuracy"]) for record in records if "accuracy" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"))
    parser.add_argument("--mixers", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(STAGES), sharey=True)
    lines = ["| | " + " | ".join(f"{length:,} tokens" for length in STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name in arguments.mixers:
        curves = [curve(train(name, length, runs)) for length in STAGES]
        for place, points in zip(axes, curves, strict=True):
            place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=MODELS[name][0])
        lines.append(f"| {MODELS[name][0]} | {' | '.join(f'{100 * points[-1][1]:.1f} %' for points in curves)} |")
    for place, (length, (pairs, *_)) in zip(axes, STAGES.items(), strict=True):
        place.set(xlabel="step", title=f"{length:,} tokens, {pairs} pairs", ylim=(-0.02, 1.02))
        place.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on held-out problems")
    axes[0].legend()
    print("\n".join(lines))
    if arguments.write:
        figure.savefig(DOCS / "recall.png", dpi=110)
        (DOCS / "recall.md").write_text(
            "# Recall\n\n`python benchmarks/recall.py --write`: accuracy on held-out problems of multi-query "
            "associative recall, at the end of each stage.\n\n"
            + "\n".join([*lines, "", "![accuracy by step](recall.png)", ""])
        )
        print(f"written to {DOCS / 'recall.md'} and .png")


if __name__ == "__main__":
    main()
