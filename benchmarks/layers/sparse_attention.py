"""Sparse mixers beside softmax attention of the same heads on a CPU, forward + backward, by length.

    python benchmarks/layers/sparse_attention.py [--lengths 4096 8192 16384 32768] [--write]

One layer each, of 8 query heads in 2 groups of 64 and with its projections, in float32; one thread, whose own time is
taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longreach.benchmarks.machine import RESULTS, machine, peak_bytes
from longreach.kernels.documents import Documents
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import InfLLMv2, MoBA
from longreach.models.mixers.sparse.native_sparse_attention import NativeSparseAttention
from longreach.parallel.sequence import Sequence

WIDTH, SIZES = 512, {"heads": 8, "kv_heads": 2, "head_dim": 64}
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "softmax attention": lambda: SoftmaxAttention(width=WIDTH, **SIZES),
    "NSA, 16 of 64, window 512": lambda: NativeSparseAttention(width=WIDTH, **SIZES),
    "MoBA, 3 of 512": lambda: MoBA(width=WIDTH, block_size=512, top_k=3, **SIZES),
    "InfLLM-v2, 16 of 64": lambda: InfLLMv2(width=WIDTH, count=16, local=4, dense_length=0, **SIZES),
}


def seconds(run: Callable[[], None]) -> float:
    run()
    best = float("inf")
    for _ in range(2):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def whole(mixer: nn.Module, x: Tensor, seq: Sequence) -> Callable[[], None]:
    def run() -> None:
        mixer.zero_grad(set_to_none=True)
        mixer(x, seq).sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times: dict[tuple[str, int], float] = {}
    memory: dict[tuple[str, int], int] = {}
    for length in arguments.lengths:
        seq = Sequence.single(Documents.whole(1, length))
        x = torch.randn(1, length, WIDTH, requires_grad=True)
        for name, build in MIXERS.items():
            mixer = build()
            for parameter in mixer.parameters():
                nn.init.normal_(parameter, std=0.04)
            run = whole(mixer, x, seq)
            times[name, length] = seconds(run)
            memory[name, length] = peak_bytes(run, "cpu")
            print(f"{name} at {length:,}: {times[name, length]:.2f} s", flush=True)
    lines = ["| mixer | " + " | ".join(f"{n:,} tokens" for n in arguments.lengths) + " |"]
    lines.append("|---" * (len(arguments.lengths) + 1) + "|")
    dense = next(iter(MIXERS))
    for name in MIXERS:
        cells = [
            f"{took / n * 1e6:.0f} µs, {took / times[dense, n]:.2f}, {memory[name, n] / 2**20:.0f} MiB"
            for n, took in ((n, times[name, n]) for n in arguments.lengths)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = (
        f"{machine('cpu')}\n\nForward + backward of a layer (width {WIDTH}, 8 query heads in 2 groups of 64), "
        "projections included: time a token, its ratio to softmax attention, peak memory.\n\n" + "\n".join(lines) + "\n"
    )
    print("\n" + text)
    if arguments.write:
        path = RESULTS / "sparse_attention_cpu.md"
        path.write_text(f"# Sparse mixers on a CPU\n\n`python benchmarks/layers/sparse_attention.py --write`, {text}")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
