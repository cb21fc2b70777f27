"""The peak memory of a step by the length of the row, beside the account of `longreach.trainer.memory`.

    python benchmarks/steps/memory.py [--lengths 32768 65536 131072] [--write]

Each step is taken in a process of its own, in float32 on a CPU with one thread, by the engine with ZeRO-1, after a
short one that makes the optimizer's states. Measured is by how much the largest resident set within the step exceeds
the one before it, where memory is given back to the system at once; the account is made from the model, on `meta`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from longreach.benchmarks.machine import RESULTS, resident
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.engine import Engine, OptimizerSettings
from longreach.trainer.memory.account import Account, account, size
from longreach.trainer.ranks import processes
from longreach.trainer.settings import Settings

PAGE = RESULTS / "memory_cpu.md"
WARM_UP = 2048  # tokens
TILE = 1024
CASES = {
    "full, in tiles": ("full", TILE),
    "mixing, in tiles": ("mixing", TILE),
    "full": ("full", None),
    "none": ("none", None),
}
HEAD = """\
| activation checkpointing | tokens | account | measured | measured / account | bytes per token | step |
|---|---|---|---|---|---|---|"""
# Memory that is let go of goes back to the system, so that the resident set is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def build(mode: str, tile: int | None) -> LanguageModel:
    """Three layers of lightning attention and one of attention in a window, 128 wide, with 512 hidden units."""
    return LanguageModel(
        vocabulary=2048,
        width=128,
        depth=4,
        pattern=["lightning*3", "window"],
        mixers={
            "lightning": partial(LightningAttention, heads=4),
            "window": partial(SoftmaxAttention, heads=4, kv_heads=2, window=512),
        },
        feed_forward=partial(SwiGLU, hidden=512),
        activation_checkpointing=mode,
        tile_tokens=tile,
    )


def predicted(mode: str, tile: int | None, length: int) -> Account:
    """The account of a step of one row."""
    settings = Settings()
    settings.data.sequence_length, settings.data.rows_per_micro_batch = length, 1
    settings.trainer.tile_tokens = tile
    return account(lambda: build(mode, tile), settings, 1, torch.device("cpu"))


def measure(mode: str, tile: int | None, length: int) -> None:
    """Takes the two steps in this process, and prints the growth of memory in the second, and its time."""
    device = processes.start(10.0)
    mesh, settings = Mesh.create(), Settings()
    engine = Engine(
        lambda: build(mode, tile), settings=settings.engine, optimizer=OptimizerSettings(), mesh=mesh, device=device
    )

    def step(tokens: int) -> None:
        ids = torch.arange(tokens).remainder(2048).unsqueeze(0)
        loss, _ = engine(ids, Sequence.single(Documents.whole(1, tokens)), ids)
        engine.backward(loss, tokens)
        engine.step(1e-3)

    step(WARM_UP)
    before, started = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is that of now
    step(length)
    print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": time.perf_counter() - started}))


def measured(case: str, length: int) -> tuple[int, float]:
    """The growth of memory, and the time, of a step in a process of its own."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, "--measure", case, "--lengths", str(length)],
        env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    result = json.loads(ran.stdout.splitlines()[-1])
    return result["bytes"], result["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--measure", choices=list(CASES))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    if chosen.measure:
        measure(*CASES[chosen.measure], chosen.lengths[0])
        return
    print(HEAD, flush=True)
    rows = _written() if chosen.write else {}
    for case in chosen.cases:
        for length in chosen.lengths:
            expected = predicted(*CASES[case], length).activations()
            got, seconds = measured(case, length)
            cells = [case, f"{length:,}", size(expected), size(got), f"{got / expected:.3f}", f"{got / length:,.0f}"]
            rows[case, length] = f"| {' | '.join(cells)} | {seconds:.0f} s |"
            print(rows[case, length], flush=True)
    if chosen.write:
        _write(rows)


def _written() -> dict[tuple[str, int], str]:
    """The rows that the page has: lengths and cases may be measured one after another."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    found = ((re.match(r"\| ([^|]+) \| ([\d,]+) \|", line), line) for line in lines)
    return {(match[1], int(match[2].replace(",", ""))): line for match, line in found if match}


def _write(rows: dict[tuple[str, int], str]) -> None:
    order = sorted(rows, key=lambda key: (list(CASES).index(key[0]), key[1]))
    longest = max(length for _, length in rows)
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores; torch {torch.__version__}; one thread"
    by_part = "\n".join(predicted("full", TILE, longest).lines())
    parts = [
        "# Peak memory of a step",
        f"`python benchmarks/steps/memory.py --write`, {datetime.date.today()}; {machine}; float32, ZeRO-1.",
        f"{build.__doc__} By how much the largest resident set within the step exceeds the one before it.",
        "\n".join([HEAD, *(rows[key] for key in order)]),
        f"The account of {longest:,} tokens with full checkpointing, in tiles:",
        f"```text\n{by_part}\n```\n",
    ]
    PAGE.write_text("\n\n".join(parts))


if __name__ == "__main__":
    main()
