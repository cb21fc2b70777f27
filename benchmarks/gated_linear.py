"""Time per token of gated linear attention on the CPU, forward + backward, by kind of decay and length.

    python benchmarks/gated_linear.py [--lengths 4096 65536] [--threads 1]

What is asked of it: the time per token at the longest length is within 1.15 times that at the shortest. With one thread
its CPU time is taken, so that a machine with other work counts little against it; lengths are taken in turn, as many
tokens of each, and of each the best round. Beside it, where transformers is installed, stands its lightning attention
(MiniMax) with autograd.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from longreach.kernels.gated_linear import gated_linear_attention

LIMIT = 1.15
Pass = Callable[[], None]


def op_pass(decay: str, length: int, heads: int, dim: int) -> Pass:
    """A forward and backward of the op on random tokens."""
    q, k, v, dout = (torch.randn(1, length, heads, dim) for _ in range(4))
    shapes = {"constant": (heads,), "scalar": (1, length, heads), "per channel": (1, length, heads, dim)}
    log_decay = -0.1 * torch.rand(shapes[decay])
    inputs = [q, k, v, log_decay]
    for x in inputs[: 3 if decay == "constant" else 4]:
        x.requires_grad_()

    def run() -> None:
        out, _ = gated_linear_attention(*inputs)
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout)

    return run


def minimax_pass(length: int, heads: int, dim: int) -> Pass | None:
    """The same of transformers' lightning attention without its projections, or None where it is not installed."""
    try:
        from transformers.models.minimax import modeling_minimax as modeling
    except ImportError:
        return None
    config = modeling.MiniMaxConfig(
        hidden_size=3 * heads * dim, num_attention_heads=heads, head_dim=dim, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    module = modeling.MiniMaxLightningAttention(config, layer_idx=0)
    identity = torch.nn.Identity()
    module.qkv_proj, module.out_proj, module.norm, module.act_fn = identity, identity, identity, identity
    module.output_gate = torch.nn.Identity()
    module.output_gate.forward = lambda x: x[..., : heads * dim]
    x = torch.randn(1, length, 3 * heads * dim, requires_grad=True)
    dout = torch.randn(1, length, heads * dim)

    def run() -> None:
        torch.autograd.grad(module(x, None, None)[0], x, dout)

    return run


def best_times(passes: dict[int, Pass], threads: int, rounds: int) -> dict[int, float]:
    """Microseconds a token for each length: the best of several rounds, each over as many tokens of every length.

    As many tokens, since the best of short runs comes from moments in which other work leaves the caches alone.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(passes, float("inf"))
    for number in range(rounds + 1):
        for length, run in passes.items():
            repeats = max(passes) // length if number else 1  # the first round warms up
            start = clock()
            for _ in range(repeats):
                run()
            if number:
                best[length] = min(best[length], (clock() - start) / (repeats * length) * 1e6)
    return best


def table(rows: dict[str, dict[int, float]], lengths: list[int]) -> str:
    lines = ["| decay | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | longest / shortest |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for name, times in rows.items():
        cells = " | ".join(f"{times[n]:.1f} µs" if n in times else "" for n in lengths)
        ratio = f"{times[lengths[-1]] / times[lengths[0]]:.2f}" if lengths[-1] in times else ""
        lines.append(f"| {name} | {cells} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lengths, sizes = sorted(arguments.lengths), (arguments.heads, arguments.dim)

    rows = {}
    for decay in ("constant", "scalar", "per channel"):
        passes = {length: op_pass(decay, length, *sizes) for length in lengths}
        rows[decay] = best_times(passes, arguments.threads, arguments.rounds)
    ours = list(rows)
    other = minimax_pass(lengths[0], *sizes)
    if other is not None:
        rows["constant, transformers' MiniMax"] = best_times({lengths[0]: other}, arguments.threads, 2)

    clock = "CPU" if arguments.threads == 1 else "wall-clock"
    print(f"gated_linear_attention, forward + backward, float32, {sizes[0]} heads of {sizes[1]}, ", end="")
    print(f"{arguments.threads} thread(s), {clock} time per token\n")
    print(table(rows, lengths))
    worst = max(rows[name][lengths[-1]] / rows[name][lengths[0]] for name in ours)
    print(f"\nper channel / scalar: {rows['per channel'][lengths[0]] / rows['scalar'][lengths[0]]:.2f}")
    print(f"longest / shortest, worst: {worst:.2f} (at most {LIMIT}: {'met' if worst <= LIMIT else 'NOT met'})")


if __name__ == "__main__":
    main()
