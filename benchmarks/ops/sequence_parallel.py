"""Ops shared by two ranks of one thread each, beside one process with two threads on the same rows; forward + backward.

    python benchmarks/ops/sequence_parallel.py [--length 16384] [--rounds 5] [--write]

Both take turns within one run, in float32 on a CPU over gloo; times are wall times of the slower rank, the best of the
rounds. Goals: a ring at most 1.25 times, state passing at most 1.15 times the time of one process.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from longreach.benchmarks.machine import RESULTS
from longreach.kernels.documents import Documents
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

RANKS, HEADS, DIM = 2, 8, 64
CASES = {  # op, documents, spans a rank, at most so many times the time of one process
    "softmax, one document": ("softmax", "whole", 2, 1.25),
    "softmax, packed": ("softmax", "packed", 8, 1.25),
    "gated linear, one document": ("gated", "whole", 1, 1.15),
    "gated linear, packed": ("gated", "packed", 1, 1.15),
    "delta rule, one document": ("delta", "whole", 1, 1.15),
    "delta rule, packed": ("delta", "packed", 1, 1.15),
}


def documents(kind: str, length: int) -> Documents:
    """One document, or lengths spread as those of source files are: many short ones, a few long ones."""
    if kind == "whole":
        return Documents.whole(1, length)
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < length:
        lengths.append(int(torch.empty(()).log_normal_(6.5, 1.2, generator=generator).clamp(16, length)))
    lengths[-1] -= sum(lengths) - length
    return Documents.from_lengths([lengths], length)


def work(op: str, seq: Sequence) -> Callable[[], Any]:
    """One forward and backward of the tokens held here."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, seq.layout.local_length, HEADS, DIM
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    k = torch.nn.functional.normalize(k, dim=-1)
    gate = torch.rand(shape[:3], generator=generator)
    inputs = [q, k, v, *{"softmax": [], "gated": [-0.1 * gate], "delta": [gate, -0.1 * gate]}[op]]
    inputs = [x.requires_grad_() for x in inputs]
    call: Callable[..., Tensor] = {
        "softmax": ops.softmax_attention, "gated": ops.gated_linear_attention, "delta": ops.delta_rule
    }[op]  # fmt: skip
    return lambda: torch.autograd.grad(call(*inputs, seq=seq), inputs, dout)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rank_main(rank: int, length: int, rounds: int, store: str, turns: Any, done: Any) -> None:
    """Measures whenever the parent gives a turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(store, RANKS))
    mesh = Mesh.create(RANKS)
    for op, kind, spans, _ in CASES.values():
        run = work(op, Sequence.shared(documents(kind, length), Layout(length, RANKS, spans), mesh, Strategy()))
        for _ in range(rounds + 1):
            turns[rank].get()
            dist.barrier()
            done.put(timed(run))
    dist.destroy_process_group()


def measure(length: int, rounds: int) -> dict[str, tuple[float, float]]:
    """(seconds of one process, of the slower of two ranks) of every case."""
    torch.set_num_threads(RANKS)
    context = processes.get_context("spawn")
    turns, done = [context.Queue() for _ in range(RANKS)], context.Queue()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (length, rounds, f"{folder}/store", turns, done)
        ranks = processes.spawn(rank_main, args=arguments, nprocs=RANKS, join=False)
        for name, (op, kind, _, _) in CASES.items():
            run = work(op, Sequence.single(documents(kind, length)))
            alone, together = [], []
            for _ in range(rounds + 1):
                alone.append(timed(run))
                for turn in turns:
                    turn.put(None)
                together.append(max(done.get() for _ in range(RANKS)))
            results[name] = min(alone[1:]), min(together[1:])
            print(f"{name}: {results[name][0]:.2f} s alone, {results[name][1]:.2f} s on two ranks", flush=True)
        ranks.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.length, arguments.rounds)
    lines = ["| op | one process, 2 threads | 2 ranks, 1 thread each | ratio | goal | |", "|---|---|---|---|---|---|"]
    for name, (alone, together) in results.items():
        goal, ratio = CASES[name][3], together / alone
        met = "met" if ratio <= goal else "NOT met"
        lines.append(f"| {name} | {alone:.3f} s | {together:.3f} s | {ratio:.2f} | {goal} | {met} |")
    text = (
        f"{datetime.date.today()}; {platform.machine()} CPU, 2 cores; torch {torch.__version__}; {arguments.length:,} "
        f"tokens, {HEADS} heads of {DIM}, float32.\n\n" + "\n".join(lines)
    )
    print("\n" + text)
    if arguments.write:
        title = "# Two ranks beside one process\n\n`python benchmarks/ops/sequence_parallel.py --write`, "
        (RESULTS / "sequence_parallel_cpu.md").write_text(f"{title}{text}\n")


if __name__ == "__main__":
    main()
