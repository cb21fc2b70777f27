"""Multi-query associative recall (arXiv 2312.04927) at 2,048 tokens: sparse attention beside full, and beside a window.

    python benchmarks/learning/recall.py [--runs runs/recall] [--models full nsa …] [--write]

Two layers each, of width 64 and with short convolutions, without rotary positions. Pairs stand anywhere in the first
half of a row, queries anywhere in the second, and all other tokens are random ones: nothing but the key tells the block
of its pair from others. Models learn the task in rows of 64 and 256 tokens, and go on in rows of 2,048 with 64 pairs,
where a query attends to 256 keys that MoBA, NSA or an indexer selects, in blocks or one by one, or to a window of the
256 last ones. MoBA and the indexers go on from what full attention learned. An indexer is warmed up first: it alone
trains, in rows of 256 tokens under full attention. Runs that are finished in the folder are not run again. `--write`
keeps table and curves in docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from longreach.benchmarks.machine import replace

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKERS = ("<!-- table: made by benchmarks/learning/recall.py -->", "<!-- end of the table -->")
STAGES = {
    64: (
        "data.recall.pairs=4", "data.recall.queries=8", "data.recall.spread=32", "data.rows_per_step=32",
        "data.rows_per_micro_batch=32", "trainer.steps=400", "evaluation.every=50",
    ),
    256: (
        "data.recall.pairs=16", "data.recall.queries=32", "data.recall.spread=128", "data.rows_per_step=16",
        "data.rows_per_micro_batch=16", "trainer.steps=150", "evaluation.every=25",
    ),
    2048: (
        "data.recall.pairs=64", "data.recall.spread=1024", "data.rows_per_step=4", "data.rows_per_micro_batch=4",
        "trainer.steps=40", "evaluation.every=10", "evaluation.at_start=true", "optimizer.learning_rate=3e-4",
    ),
}  # fmt: skip
LENGTHS = tuple(STAGES)
LAST = LENGTHS[-1]
WARM_UP = 300  # steps
COMMON = (
    "data=recall", "data.recall.filler=random", "data.recall.power=1.0", "data.vocabulary_size=256", "model.width=64",
    "model.depth=2", "model.feed_forward.hidden=128", "+model.initial_std=0.1", "model.tied_embeddings=true",
    "optimizer.learning_rate=3e-3", "optimizer.weight_decay=0.01", "schedule.kind=wsd", "evaluation.rows=16",
    "logger.wandb.mode=disabled",
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
    """What it is, overrides, whose earlier stages it goes on from, and the layer that is warmed up alone, if any."""

    label: str
    overrides: tuple[str, ...]
    origin: str
    alone: str | None = None


MODELS = {
    "full": Model("full attention", ("model=llama_tiny", *settings("softmax")), "full"),
    "moba_32": Model("MoBA, 8 blocks of 32", moba(32, 8), "full"),
    "indexed_32": Model("indexer, 8 blocks of 32", indexed(32, 8), "full", "indexer"),
    "indexed_64": Model("indexer, 4 blocks of 64", indexed(64, 4), "full", "indexer"),
    "cold_32": Model("indexer, 8 blocks of 32, not warmed up", indexed(32, 8), "full"),
    "moba": Model("MoBA, 64 blocks of 4", moba(4, 64), "full"),
    "window": Model("window of 256", ("model=llama_tiny", *settings("softmax", window=256)), "window"),
    "nsa": Model(
        "NSA, 8 blocks of 32",
        ("model=nsa_tiny", *settings("nsa", 2, block_size=32, count=8, near=64, compression_hidden=32)),
        "nsa",
    ),
    "tokens": Model("indexer, 256 tokens", tokens(256), "full", "indexer"),
}


def train(name: str, length: int, runs: Path) -> Path:
    """The run of a stage; trains it unless it is there, from the weights of the stage before."""
    model = MODELS[name]
    if length != LAST:
        name = model.origin
    before = None
    if model.alone is not None and length == LAST:
        before = warm_up(name, runs)
    elif length != LENGTHS[0]:
        before = train(model.origin, LENGTHS[LENGTHS.index(length) - 1], runs)
    return run_of(name, str(length), runs, before, *STAGES[length], f"data.sequence_length={length}")


def warm_up(name: str, runs: Path) -> Path:
    """The run in which one layer alone trains, under full attention."""
    length, model = LENGTHS[-2], MODELS[name]
    more = (
        f"data.sequence_length={length}", f"trainer.steps={WARM_UP}", f"optimizer.only=[{model.alone}]",
        f"++model.mixers.sparse.dense_steps={WARM_UP}",
    )  # fmt: skip
    return run_of(name, "warm_up", runs, train(model.origin, length, runs), *STAGES[length], *more)


def run_of(name: str, stage: str, runs: Path, before: Path | None, *more: str) -> Path:
    """The run of a model, from the weights of an earlier one if any; trains it unless it is there."""
    run = runs / f"{name}-{stage}"
    overrides = [*COMMON, *MODELS[name].overrides, f"run.dir={run}", *more]
    if before is not None:
        overrides.append(f"init_from={before}")
    chosen = {override.partition("=")[0]: override for override in overrides}  # the last of each
    last = int(chosen["trainer.steps"].partition("=")[2])
    if (points := curve(run)) and points[-1][0] == last:
        return run
    command = [sys.executable, "-m", "longreach.launch.train", *chosen.values()]
    subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=True)
    return run


def curve(run: Path, measure: str = "accuracy") -> list[tuple[int, float]]:
    """(step, measure) of a run: the accuracy is that of held-out problems."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(record["step"], record[measure]) for record in records if measure in record]


def draw(names: list[str], curves: dict[tuple[str, int], list[tuple[int, float]]], runs: Path) -> Figure:
    """Accuracy by step, a panel for each length, and the loss of the indexers while they are warmed up."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    (first, second), (warming, last) = figure.subplots(2, 2)
    for place, length in zip((first, second, last), LENGTHS, strict=True):
        for name in names:
            if (name, length) in curves:
                place.plot(*zip(*curves[name, length], strict=True), marker="o", markersize=4, **style(name))
        pairs = STAGES[length][0].partition("=")[2]
        place.set(title=f"{length:,} tokens, {pairs} pairs", ylabel="accuracy on held-out problems", ylim=(-0.02, 1.04))
    for name in names:
        if MODELS[name].alone is not None:
            warming.plot(*zip(*curve(warm_up(name, runs), "auxiliary_index"), strict=True), **style(name))
    warming.set(title=f"warm-up, {LENGTHS[-2]} tokens", ylabel="divergence of indexer from attention", yscale="log")
    for place in (first, second, warming, last):
        place.set_xlabel("step")
        place.grid(alpha=0.25)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def style(name: str) -> dict[str, Any]:
    """Of a model's curves in every panel; curves that agree are seen one above the other."""
    number = list(MODELS).index(name)
    return {"color": f"C{number}", "linewidth": 4 - 0.4 * number, "label": MODELS[name].label}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/recall"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    runs, names = arguments.runs.resolve(), arguments.models
    curves = {}
    for name in names:
        own = LENGTHS if MODELS[name].origin == name else (LAST,)
        curves |= {(name, length): curve(train(name, length, runs)) for length in own}
    steps = curves[names[0], LAST][-1][0]
    before = [f"{length:,} tokens" for length in LENGTHS[:-1]]
    heads = [*before, f"{LAST:,} tokens, before any step", f"after {steps} steps"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        ends = [curves[name, length][-1] if (name, length) in curves else None for length in LENGTHS[:-1]]
        shown = [*ends, curves[name, LAST][0], curves[name, LAST][-1]]
        cells = ["" if point is None else f"{100 * point[1]:.1f} %" for point in shown]
        lines.append(f"| {MODELS[name].label} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if arguments.write:
        draw(names, curves, runs).savefig(DOCS / "recall.png", dpi=110)
        replace(DOCS / "recall.md", MARKERS, "\n".join(lines))
        print(f"written to {DOCS / 'recall.md'} and .png")


if __name__ == "__main__":
    main()
