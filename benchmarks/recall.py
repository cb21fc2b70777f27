"""Multi-query associative recall (arXiv 2312.04927) at 2,048 tokens: sparse attention beside full, and beside a window.

    python benchmarks/recall.py [--runs runs/recall] [--models full nsa …] [--write]

Two layers each, of width 64 and with short convolutions, without rotary positions. Models learn the task in rows of 256
tokens with 16 pairs, and go on in rows of 2,048 with 64 pairs and queries anywhere, where a query attends to 256 keys
that MoBA, NSA or an indexer selects, in blocks or one by one, or to a window of the 256 last ones. MoBA and the
indexers go on from what full attention learned. An indexer is warmed up first: it alone trains, in rows of 256 tokens
under full attention.
Runs that are finished in the folder are not run again. `--write` keeps table and curves in docs/.
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


def moba(block_size: int, top_k: int) -> tuple[str, ...]:
    sizes = settings("moba", block_size=block_size, top_k=top_k)
    return ("model=moba_tiny", "model.pattern=[moba]", "~model.mixers.softmax", *sizes)


def indexed(block_size: int, count: int) -> tuple[str, ...]:
    sizes = {"block_size": block_size, "count": count, "head_dim": 64, "index_dim": 64, "rope_fraction": 1.0}
    chosen = settings("sparse", **sizes, qk_norm="null")
    return ("model=minimax_sparse_tiny", "model.pattern=[sparse]", "~model.mixers.softmax", *chosen)


def tokens(top_k: int) -> tuple[str, ...]:
    sizes = {"top_k": top_k, "index_heads": 4, "index_dim": 64, "index_rope_fraction": 1.0}
    return ("model=deepseek_sparse_tiny", *settings("sparse", **sizes))


class Model(NamedTuple):
    """What it is, overrides, whose first stage it goes on from, and the layer that is warmed up by itself, if any."""

    label: str
    overrides: tuple[str, ...]
    origin: str
    alone: str | None = None


MODELS = {
    "full": Model("full attention", ("model=llama_tiny", *settings("softmax")), "full"),
    "window": Model("window of 256", ("model=llama_tiny", *settings("softmax", window=256)), "window"),
    "nsa": Model(
        "NSA, 8 blocks of 32",
        ("model=nsa_tiny", *settings("nsa", 2, block_size=32, count=8, near=64, compression_hidden=32)),
        "nsa",
    ),
    "moba": Model("MoBA, 64 blocks of 4", moba(4, 64), "full"),
    "moba_32": Model("MoBA, 8 blocks of 32", moba(32, 8), "full"),
    "indexed_32": Model("indexer, 8 blocks of 32", indexed(32, 8), "full", "indexer"),
    "indexed_64": Model("indexer, 4 blocks of 64", indexed(64, 4), "full", "indexer"),
    "tokens": Model("indexer, 256 tokens", tokens(256), "full", "indexer"),
}
WARM_UP = 300  # steps


def train(name: str, length: int, runs: Path) -> Path:
    """The run of a stage; trains it unless it is there, from the weights of the stage before."""
    (first, _), model = STAGES, MODELS[name]
    if length == first:
        name, before = model.origin, None
    else:
        before = runs / f"{model.origin}-{first}" if model.alone is None else warm_up(name, runs)
    return run_of(name, str(length), runs, before, *STAGES[length], f"data.sequence_length={length}")


def warm_up(name: str, runs: Path) -> Path:
    """The run in which one layer alone trains, under full attention."""
    (first, _), model = STAGES, MODELS[name]
    more = (
        f"data.sequence_length={first}", f"trainer.steps={WARM_UP}", f"optimizer.only=[{model.alone}]",
        f"++model.mixers.sparse.dense_steps={WARM_UP}",
    )  # fmt: skip
    return run_of(name, "warm_up", runs, runs / f"{model.origin}-{first}", *STAGES[first], *more)


def run_of(name: str, stage: str, runs: Path, before: Path | None, *more: str) -> Path:
    """The run of a model, from the weights of an earlier one if any; trains it unless it is there."""
    run = runs / f"{name}-{stage}"
    if (run / "plots" / "loss.png").exists():
        return run
    overrides = [*COMMON, *MODELS[name].overrides, f"run.dir={run}", *more]
    if before is not None:
        overrides.append(f"init_from={before}")
    chosen = {override.partition("=")[0]: override for override in overrides}  # the last of each
    command = [sys.executable, "-m", "longreach.launch.train", *chosen.values()]
    subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=True)
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
            place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=MODELS[name].label)
        lines.append(f"| {MODELS[name].label} | {' | '.join(f'{100 * points[-1][1]:.1f} %' for points in curves)} |")
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
            "associative recall, at the end of each stage. MoBA and the indexers go on from full attention's first "
            f"stage; indexers train alone for {WARM_UP} steps of 256 tokens before the second.\n\n"
            + "\n".join([*lines, "", "![accuracy by step](recall.png)", ""])
        )
        print(f"written to {DOCS / 'recall.md'} and .png")


if __name__ == "__main__":
    main()
