"""How a step scales from 1M to 16M tokens and from 1 to 4,096 GPUs, as the planner predicts it; nothing is measured.

    python benchmarks/planner/scaling.py [--models llama …] [--write]

For each model, length and number of H100s: one row of that length a step, shared by all GPUs, in the fastest of a few
ways that fits. --write puts figure and tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from longreach.benchmarks.planner.composed import composed, estimator
from longreach.trainer.planning.cluster import ClusterSettings
from longreach.trainer.planning.estimate import Estimate, Estimator
from longreach.trainer.settings import Settings, check

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[1] / "results" / "scaling_predicted.json"
MODELS = {  # of 8 billion parameters or near, so that layers alone differ
    "llama": ("model=llama_8b",),
    "lightning 7:1": ("model=minimax_01_8b",),
    "KDA:MLA 3:1": (
        "model=kimi_linear_48b", "model.width=4096", "model.depth=32",
        "model.pattern=[kda|dense*3,mla|dense]", "~model.mixers.moe", "model.mixers.dense.hidden=12288",
    ),
    "NSA": ("model=nsa_1b", "model.width=4096", "model.depth=32", "model.feed_forward.hidden=14336",
            "model.mixers.nsa.heads=64", "model.mixers.nsa.kv_heads=4"),
}  # fmt: skip
COMMON = (
    "model.vocabulary=131072", "trainer.dtype=bfloat16", "data.rows_per_step=1", "parallel=zigzag",
    "engine.zero_stage=3", "trainer.activation_checkpointing=full", "trainer.tile_tokens=4096", "cluster=h100_node",
)  # fmt: skip
WITH_STATES = ("lightning", "kda")
LENGTHS = (2**20, 2**22, 2**24)
GPUS = (1, 8, 64, 512, 4096)
SHARES = tuple(2**n for n in range(9, 18))  # tokens of a rank, for crossing points


def ways(settings: Settings, gpus: int, length: int, with_states: bool) -> Iterator[Settings]:
    """A ring among all, or heads exchanged within a node and a ring between nodes, of attention alone and of layers
    with states too; activations kept or offloaded, and the optimizer's states.
    """
    shared = [(1, "state_passing"), *([(8, "state_passing")] * (gpus > 1)), *([(8, "ulysses")] * with_states)]
    for (ulysses, recurrent), offload, states in product(shared, (False, True), ("none", "optimizer")):
        made = deepcopy(settings)
        made.data.sequence_length, made.parallel.sequence = length, gpus
        if gpus == 1:
            made.parallel.layout, made.parallel.spans = "contiguous", None
        if ulysses > 1:
            made.parallel.attention, made.parallel.ulysses = "ulysses", ulysses
            made.parallel.recurrent = recurrent
        made.trainer.offload_activations = offload
        made.engine = replace(made.engine, offload=states)
        yield made


def best(of: Estimator, settings: Settings, cluster: ClusterSettings, length: int, gpus: int) -> Estimate | str:
    """The fastest that fits, or what the one that needs least memory of a GPU lacks."""
    cluster = deepcopy(cluster)
    cluster.gpus_per_node = min(gpus, cluster.gpus_per_node)
    cluster.nodes = gpus // cluster.gpus_per_node
    found: list[Estimate] = []
    others: list[Estimate] = []
    with_states = gpus > 1 and any(name.partition("|")[0] in WITH_STATES for name in of.whole.names)
    for way in ways(settings, gpus, length, with_states):
        try:
            check(way, cluster.gpus)
            estimate = of.estimate(way, cluster)
        except ValueError:
            continue
        (others if estimate.refusal() else found).append(estimate)
    if found:
        return min(found, key=lambda each: each.step)
    return min(others, key=lambda each: each.memory).refusal() or ""


def facts(estimate: Estimate) -> dict[str, Any]:
    """What the tables show."""
    exposed = sum(estimate.seconds[name] for name in estimate.hidden)
    attention = [of for of in estimate.sent.values() if of.overlaps]
    return {
        "seconds": estimate.step,
        "mfu": estimate.mfu,
        "memory_gb": estimate.memory / 1e9,
        "exposed": exposed / estimate.step,
        "ring_exposed": sum(s for n, s in estimate.seconds.items() if n in estimate.hidden and "ZeRO" not in n),
        "ring_seconds": sum(of.seconds for of in attention),
        "ulysses": estimate.settings.parallel.ulysses or 1,
        "recurrent": estimate.settings.parallel.recurrent,
        "offload": estimate.settings.trainer.offload_activations,
        "states": estimate.settings.engine.offload,
        "tokens_a_day": estimate.tokens_a_day,
    }


def study(name: str, known: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """All lengths and numbers of GPUs for one model, row by row; `known` are not computed again."""
    if len(known) == len(LENGTHS) * len(GPUS):
        return
    settings, cluster = composed(*MODELS[name], *COMMON)
    of, rows = estimator(settings), list(known)
    for length in LENGTHS:
        for gpus in GPUS:
            if any((row["tokens"], row["gpus"]) == (length, gpus) for row in known):
                continue
            found = best(of, settings, cluster, length, gpus)
            row = {"model": name, "tokens": length, "gpus": gpus, "parameters": of.whole.parameter_count()}
            rows.append(row | ({"seconds": None, "why": found} if isinstance(found, str) else facts(found)))
            print(json.dumps(rows[-1]), flush=True)
            yield rows


def crossings(found: dict[str, dict[str, int | None]], write: bool) -> None:
    """For numbers of ranks, the fewest tokens of a rank, a power of two, from which on …; None where at none."""
    for name, kind, what in (
        ("llama", "softmax", "a ring of Llama's attention is hidden"),
        ("llama", "softmax", "a ring takes less than heads exchanged within a node and a ring between nodes"),
        ("lightning 7:1", "lightning", "lightning attention's states take less than its heads exchanged"),
        ("KDA:MLA 3:1", "kda", "KDA's states take less than its heads exchanged"),
    ):
        settings, cluster = composed(*MODELS[name], *COMMON)
        of, by_ranks = estimator(settings), found.setdefault(what, {})
        for ranks in (8, 64, 512):
            if str(ranks) in by_ranks:
                continue
            cluster.nodes = ranks // cluster.gpus_per_node
            fewest = None
            for tokens in reversed(SHARES):
                made = deepcopy(settings)
                made.parallel.sequence, made.data.sequence_length = ranks, ranks * tokens
                first, second = exposed(of, made, cluster, kind), 0.0
                if "hidden" not in what:
                    made.parallel.attention, made.parallel.ulysses = "ulysses", 8
                    if kind != "softmax":
                        made.parallel.recurrent = "ulysses"
                    second = exposed(of, made, cluster, kind)
                if first > second + 1e-9:
                    break
                fewest = tokens
            by_ranks[str(ranks)] = fewest
            print(what, ranks, fewest, flush=True)
            _keep("crossings", found, write)


def exposed(of: Estimator, settings: Settings, cluster: ClusterSettings, kind: str) -> float:
    """Seconds of a step in which layers of a kind wait for what is sent."""
    made = of.estimate(settings, cluster)
    return sum(made.seconds[name] for name in made.hidden if name.startswith(f"{kind}: "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--crossings", action="store_true", help="where one exchange takes less than another")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    if chosen.crossings:
        crossings(_kept().get("crossings", {}), chosen.write)
        chosen.models = []
    for name in chosen.models:
        for rows in study(name, _kept().get(name, [])):
            _keep(name, rows, chosen.write)
    if chosen.write:
        kept = _kept()
        draw(kept)
        page = DOCS / "scaling.md"
        before, _, _ = page.read_text().partition("<!-- tables -->")
        page.write_text(before + "<!-- tables -->\n" + "\n".join(tables(kept)) + "\n")


def _kept() -> dict[str, Any]:
    """What earlier runs have found: a run that ends early loses nothing."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _keep(name: str, found: Any, write: bool) -> None:
    if write:
        RESULTS.write_text(json.dumps({**_kept(), name: found}, indent=1) + "\n")


def tables(kept: dict[str, Any]) -> Iterator[str]:
    if "crossings" in kept:
        yield "\nBy ranks that share a row, the fewest tokens of a rank (powers of two from 512 to 131,072):\n"
        yield "| from so many tokens of a rank on | 8 ranks | 64 ranks | 512 ranks |\n|---|---|---|---|"
        for what, by_ranks in kept["crossings"].items():
            yield f"| {what} | " + " | ".join(f"{n:,}" if n else "at none" for n in by_ranks.values()) + " |"
    for name in (name for name in MODELS if kept.get(name)):
        rows = kept[name]
        yield f"\n### {name}, {rows[0]['parameters'] / 1e9:.2f} billion parameters\n"
        yield "Seconds a step, MFU, the share of the step that is exposed communication, and what is chosen.\n"
        yield "| tokens | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |"
        yield "|---" * (len(GPUS) + 1) + "|"
        for length in LENGTHS:
            cells = []
            for gpus in GPUS:
                row = next((r for r in rows if (r["tokens"], r["gpus"]) == (length, gpus)), None)
                if row is None:
                    cells.append("")
                elif row["seconds"] is None:
                    cells.append(f"does not fit: {row['why']}")
                else:
                    by_heads = "r" if row["recurrent"] == "ulysses" else "u"
                    chosen = [(by_heads, row["ulysses"] > 1), ("a", row["offload"]), ("o", row["states"] != "none")]
                    how = "".join(letter for letter, is_so in chosen if is_so)
                    seconds = f"{row['seconds']:,.0f}" if row["seconds"] >= 100 else f"{row['seconds']:.3g}"
                    cells.append(f"{seconds} s, {row['mfu']:.1%}, {row['exposed']:.0%}{f' ({how})' if how else ''}")
            yield f"| {length:,} | " + " | ".join(cells) + " |"


def draw(kept: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(LENGTHS), figsize=(3.4 * len(LENGTHS), 6.0), sharey="row", sharex=True)
    for (above, below), length in zip(axes.T, LENGTHS, strict=True):
        for name in (name for name in MODELS if kept.get(name)):
            found = [r for r in kept[name] if r["tokens"] == length and r["seconds"] is not None]
            gpus = [r["gpus"] for r in found]
            above.plot(gpus, [r["seconds"] for r in found], marker="o", label=name)
            below.plot(gpus, [100 * r["mfu"] for r in found], marker="o", label=name)
        above.set_title(f"a row of {length // 2**20}M tokens")
        above.set_yscale("log")
        below.set_xscale("log")
        below.set_xlim(0.7, 6000)
        below.set_ylim(0, 65)
        below.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        below.minorticks_off()
        below.set_xlabel("H100s that share the row")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds a step, predicted")
    axes[1][0].set_ylabel("MFU in %, predicted")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "scaling.png", dpi=110)


if __name__ == "__main__":
    main()
