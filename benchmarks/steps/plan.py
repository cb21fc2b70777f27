"""The host's work for a batch: what a rank derives from the documents of its rows ahead of a step.

    python benchmarks/steps/plan.py [--ranks 64] [--spans 8] [--tokens 1048576] [--documents 1 1000 16000] [--rounds 9]

A row of so many tokens is cut into documents at random places and shared by the ranks. Timed are: the documents, which
ranks need which keys (a ring, causal and with a window), lists of blocks for the kernels of this rank's tiles, the
documents of its spans for recurrent ops, ids and positions, and the meters. All of it runs in the thread that reads
ahead, on one core, without a process group.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
import torch.distributed as dist

from longreach.kernels.derived import Recipes
from longreach.kernels.documents import Documents, continuing
from longreach.kernels.masks import Mask
from longreach.kernels.masks.block_ranges import key_ranges, query_ranges
from longreach.kernels.softmax import SoftmaxAttend
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategies.ring import RingPlan
from longreach.trainer.run.metrics import attention_pairs

MASKS = (Mask(), Mask(window=4096))


def lengths_of(documents: int, tokens: int, seed: int) -> list[int]:
    """The lengths of documents that fill a row."""
    cuts = sorted(random.Random(seed).sample(range(1, tokens), documents - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)]


def use(seq: Sequence) -> None:
    """What a step of a hybrid with softmax and recurrent layers asks for."""
    for mask in MASKS:
        for tile in RingPlan.of(SoftmaxAttend(mask, 1.0), seq).tiles:
            if tile is not None:
                key_ranges(tile, 128, 64)
                query_ranges(tile, 64, 128)
    seq.spans.ids()
    seq.spans.derive(continuing)
    seq.positions()


def milliseconds(documents: int, layout: Layout, rounds: int) -> list[float]:
    """The time of each round, each for a batch of its own; the first batch, which teaches the others, is left out."""
    recipes, times = Recipes(), []
    group = None if layout.ranks == 1 else dist.ProcessGroup(0, layout.ranks)  # type: ignore[call-arg]
    for number in range(rounds + 1):
        lengths = lengths_of(documents, layout.length, number)
        started = time.perf_counter()
        rows = Documents.from_lengths([lengths])
        seq = Sequence(rows, layout, rank=layout.ranks // 2, group=group)
        recipes.prepare(seq)
        attention_pairs(rows, layout)
        times.append(1000 * (time.perf_counter() - started))
        use(seq)
        recipes.learn(seq)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--spans", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 1000, 16000])
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| documents per row | ms per batch, median | largest |\n|---|---|---|")
    for documents in chosen.documents:
        times = milliseconds(documents, Layout(chosen.tokens, chosen.ranks, chosen.spans), chosen.rounds)
        print(f"| {documents:,} | {statistics.median(times):.1f} | {max(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
