"""Every op, forward + backward, beside what a user would take instead: time, memory, and time per token by length.

    python benchmarks/ops/kernels.py [--device cpu|cuda] [--ops delta_rule …] [--lengths 4096 8192 65536] [--write]

On a CPU in float32 with one thread, whose own time is taken (other work on the machine counts little then); on CUDA in
bf16 by events. The floor is the op's own count of FLOPs (a backward as 2.5 forwards) at the rate of a plain matrix
product. Peers run where they are installed: torch's SDPA, flash-attn, flash-linear-attention, Liger-Kernel, and on a
CPU the torch functions of transformers. `--write` keeps the tables and a plot in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from longreach.benchmarks.machine import RESULTS, machine, peak_bytes
from longreach.benchmarks.ops.ops_and_peers import CASES, DIM, GOAL_LENGTH, HEADS, LINEAR, Pass, draw

warnings.filterwarnings("ignore")
PATIENCE_SECONDS = 20.0  # what takes longer is run once
Key = tuple[str, int]  # who, and at how many tokens


class Goal(NamedTuple):
    """How an op has to compare with a peer (or another op) at GOAL_LENGTH tokens on a CPU."""

    op: str
    peer: str
    faster: float | None = None  # at least so many times as fast
    slower: float | None = None  # or at most so many times its time
    memory: bool = True  # and at most half its peak memory


GOALS = (
    Goal("delta_rule scalar", "transformers", faster=4.5),
    Goal("gated_linear scalar", "transformers", faster=2.5),
    Goal("gated_linear scalar", "floor", slower=3.0, memory=False),
    Goal("gated_linear per channel", "gated_linear scalar", slower=2.5, memory=False),
    Goal("softmax", "torch SDPA", slower=1.1, memory=False),
    Goal("mamba2", "transformers", faster=3.0),
)


def seconds(passes: dict[Key, Pass], device: str, rounds: int) -> dict[Key, float]:
    """The best time of each pass that memory suffices for; they take turns, so that all see the same machine."""
    best: dict[Key, float] = {}
    for key, run in passes.items():
        try:
            warm_up = _once(run, device)
        except torch.cuda.OutOfMemoryError:
            continue
        best[key] = warm_up if warm_up > PATIENCE_SECONDS else float("inf")
    repeated = [key for key, taken in best.items() if taken == float("inf")]
    for _ in range(rounds):
        for key in repeated:
            best[key] = min(best[key], _once(passes[key], device))
    return best


def _once(run: Pass, device: str) -> float:
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        run()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def product(device: str) -> tuple[Pass, int]:
    """Plain matrix products, about as long as an op takes so that both see the machine alike, and their FLOPs."""
    n, times = (8192, 1) if device == "cuda" else (1024, 10)
    x, y = draw(n, n, device=device), draw(n, n, device=device)

    def run() -> None:
        for _ in range(times):
            torch.mm(x, y)

    return run, 2 * n**3 * times


class Measured(NamedTuple):
    seconds: float
    bytes: int


def measure(
    names: list[str], lengths: list[int], device: str, rounds: int, peers: bool = True
) -> dict[tuple[str, str, int], Measured]:
    """What each op ("ours") and each of its peers took, and the floor, by op, who, and length."""
    plain, flops = product(device)
    results = {}
    for name in names:
        passes, floors = {("floor", 0): plain}, {}
        for length in lengths:
            if name == "softmax" and device == "cpu" and length > GOAL_LENGTH:
                continue  # quadratic: minutes
            case = CASES[name](length, device)
            floors[length] = 3.5 * case.flops / flops
            passes["ours", length] = case.ours
            if peers and (length <= GOAL_LENGTH or device == "cuda"):
                passes.update({(who, length): run for who, run in case.peers.items()})
        best = seconds(passes, device, rounds)
        for (who, length), taken in best.items():
            if length:
                results[name, who, length] = Measured(taken, peak_bytes(passes[who, length], device))
        for length, products in floors.items():
            results[name, "floor", length] = Measured(products * best["floor", 0], 0)
        own = {key: value for key, value in results.items() if key[0] == name}
        # What a run tells that is cut short.
        print(f"{name}: measured\n{tables(own, [name], lengths)}", flush=True)
    return results


def tables(results: dict[tuple[str, str, int], Measured], names: list[str], lengths: list[int]) -> str:
    lines = ["| op | who | " + " | ".join(f"{n:,} tokens" for n in lengths) + f" | peak at {lengths[0]:,} |"]
    lines.append("|---" * (len(lengths) + 3) + "|")
    for name in names:
        for who in dict.fromkeys(who for op, who, _ in results if op == name):
            found = [results.get((name, who, n)) for n in lengths]
            cells = [f"{m.seconds / n * 1e6:.2f} µs" if m else "" for m, n in zip(found, lengths, strict=True)]
            held = f"{found[0].bytes / 2**20:.0f} MiB" if found[0] and who != "floor" else ""
            lines.append(f"| {name} | {who} | {' | '.join(cells)} | {held} |")
    return "\n".join(lines)


def verdicts(results: dict[tuple[str, str, int], Measured], names: list[str], lengths: list[int]) -> str:
    lines = ["| goal | measured | |", "|---|---|---|"]
    for goal in GOALS:
        ours = results.get((goal.op, "ours", GOAL_LENGTH))
        other = results.get((goal.op, goal.peer, GOAL_LENGTH)) or results.get((goal.peer, "ours", GOAL_LENGTH))
        if ours is None or other is None:
            continue
        if goal.faster is not None:
            ratio = other.seconds / ours.seconds
            said, met = f"{goal.op}: at least {goal.faster}x as fast as {goal.peer}", ratio >= goal.faster
        else:
            assert goal.slower is not None
            ratio = ours.seconds / other.seconds
            said, met = f"{goal.op}: at most {goal.slower}x the time of {goal.peer}", ratio <= goal.slower
        lines.append(f"| {said} | {ratio:.2f} | {'met' if met else 'NOT met'} |")
        if goal.memory:
            share = ours.bytes / other.bytes
            met = share <= 0.5
            said = f"{goal.op}: at most half the peak memory of {goal.peer}"
            lines.append(f"| {said} | {share:.2f} | {'met' if met else 'NOT met'} |")
    for name in names:
        ends = [results.get((name, "ours", n)) for n in (4096, 65536)]
        if name in LINEAR and ends[0] and ends[1]:
            ratio = ends[1].seconds / 65536 / (ends[0].seconds / 4096)
            met = "met" if ratio <= 1.15 else "NOT met"
            lines.append(f"| {name}: time per token at 65,536 within 1.15x of 4,096 | {ratio:.2f} | {met} |")
    return "\n".join(lines)


def plot(results: dict[tuple[str, str, int], Measured], names: list[str], lengths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in names:
        points = [(n, results[name, "ours", n].seconds / n * 1e6) for n in lengths if (name, "ours", n) in results]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs a token, forward + backward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--no-peers", action="store_true", help="only the ops and the floor")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    default = [4096, GOAL_LENGTH, 65536] if device == "cpu" else [2**n for n in range(11, 21)]
    lengths = sorted(arguments.lengths or default)
    names = arguments.ops
    results = measure(names, lengths, device, arguments.rounds, not arguments.no_peers)
    text = f"{machine(device)}\n\nForward + backward, {HEADS} heads of {DIM}, time a token.\n\n"
    text += f"{tables(results, names, lengths)}\n"
    if device == "cpu":
        text += f"\n{verdicts(results, names, lengths)}\n"
    print("\n" + text)
    if arguments.write:
        stem = RESULTS / f"kernels_{'cpu' if device == 'cpu' else torch.cuda.get_device_name().split()[-1].lower()}"
        command = "`python benchmarks/ops/kernels.py --write`"
        stem.with_suffix(".md").write_text(f"# Ops on {'a CPU' if device == 'cpu' else 'a GPU'}\n\n{command}, {text}")
        plot(results, names, lengths, stem.with_suffix(".png"))
        print(f"written to {stem}.md and .png")


if __name__ == "__main__":
    main()
