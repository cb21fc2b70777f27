"""The planner's time and memory beside figures that others published, and beside this project's own steps on an H200.

    python benchmarks/planner/published.py [--only NAME …]

Nothing is tuned for a figure: efficiencies are those of conf/cluster. docs/plan.md keeps the table, with sources.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from longreach.benchmarks.planner.composed import composed, estimate
from longreach.kernels import delta_rule
from longreach.trainer.planning.links import ring

LLAMA = ("model=llama_8b", "model.vocabulary=128256", "trainer.dtype=bfloat16", "data.rows_per_step=1")
ULYSSES = ("parallel=zigzag", "parallel.attention=ulysses")
H200 = (
    "cluster=h200_node", "cluster.gpus_per_node=1", "data.sequence_length=131072", "data.rows_per_step=1",
    "trainer.dtype=bfloat16", "model.vocabulary=32768",
)  # fmt: skip


class Figure(NamedTuple):
    """What was reported of a setting; None where it was not."""

    overrides: tuple[str, ...]
    seconds: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None


FIGURES = {
    "ALST, Llama-8B, 3.7M tokens, 8 H100": Figure(
        (*LLAMA, *ULYSSES, "parallel.sequence=8", "data.sequence_length=3670016", "engine.zero_stage=3",
         "engine.offload=optimizer", "trainer.activation_checkpointing=full", "trainer.offload_activations=true",
         "trainer.tile_tokens=4096"),
        memory_gb=80.0,
    ),
    "Qwen3-8B, 1,048,576 tokens, 8 H100": Figure(
        (*LLAMA, *ULYSSES, "model.depth=36", "model.feed_forward.hidden=12288", "model.vocabulary=151936",
         "parallel.sequence=8", "data.sequence_length=1048576", "engine.zero_stage=3",
         "trainer.activation_checkpointing=full", "trainer.tile_tokens=4096"),
        seconds=380.0,
        memory_gb=56.2,
    ),
    "USP, Llama-3-8B, 208k tokens, 16 A800": Figure(
        (*LLAMA, *ULYSSES, "parallel.sequence=16", "parallel.ulysses=8", "data.sequence_length=212992",
         "engine.zero_stage=3", "trainer.activation_checkpointing=full", "cluster=a100_node", "cluster.nodes=2",
         "cluster.node_gbps=200"),
        mfu=0.47,
    ),
    "own step, H200, llama_125m": Figure(("model=llama_125m", *H200), 2.75, 0.378, 42.0),
    "own step, H200, minimax_01_125m": Figure(("model=minimax_01_125m", *H200), 0.622, 0.354, 60.5),
    "own step, H200, gated_deltanet_hybrid_125m": Figure(
        ("model=gated_deltanet_hybrid_125m", *H200), 1.08, 0.304, 50.9
    ),
    "own step, H200, nsa_1b of one layer": Figure(("model=nsa_1b", "model.depth=1", *H200), 0.366, 0.346, 20.7),
}  # fmt: skip


def compared(predicted: float, reported: float | None, form: str) -> str:
    text = format(predicted, form)
    if reported is None:
        return f"{text} | –"
    return f"{text} | {format(reported, form)}, {predicted / reported - 1:+.0%}"


def gated_deltanet() -> str:
    """flash-linear-attention's op on 4 H800: 32,768 tokens, 64 heads of 128, forward and backward."""
    _, cluster = composed("cluster=h100_node", "cluster.node_gbps=200")
    ranks, heads, dim = 4, 64, 128
    flops = delta_rule.flops(32768 // ranks, heads=heads, key_dim=dim, value_dim=dim)
    computing = 3.5 * flops / (cluster.peak * cluster.share("delta_rule, scalar")[0])
    gathered = (ranks - 1) * heads * dim * 4
    sends = [ring(gathered * size, range(ranks), cluster).seconds for size in (2 * dim, dim)]
    return f"| flash-linear-attention, Gated DeltaNet | {compared(1e3 * (computing + sum(sends)), 5.73, '.2f')} | ms |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(FIGURES), choices=list(FIGURES))
    chosen = parser.parse_args()
    print("| figure | seconds | reported, error | MFU | reported, error | GB | reported, error |")
    print("|---|---|---|---|---|---|---|")
    for name in chosen.only:
        figure = FIGURES[name]
        made = estimate(*figure.overrides)
        cells = [
            compared(made.step, figure.seconds, ".3g"), compared(made.mfu, figure.mfu, ".1%"),
            compared((made.memory - made.cluster.reserved_gb * 1e9) / 1e9, figure.memory_gb, ".1f"),
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(gated_deltanet())


if __name__ == "__main__":
    main()
