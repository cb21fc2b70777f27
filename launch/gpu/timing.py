"""Times of the ops of benchmarks/ops/kernels.py, forward + backward, beside a floor and what a user would take."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

from ... import __path__ as package
from .step import Here, Step

LENGTHS, FEW = (8192, 32768, 131072), (64, 128)
ROUNDS, ONCE = 3, 1
LEAST_SECONDS = 5.0  # for an op at one length
OWN_SECONDS = 60.0  # for an op and the peers that need no tuning
PEER = "flash-linear-attention"
LATER = (PEER, "transformers")  # the second, on a CPU, is left to benchmarks/ops/kernels.py
PEER_SECONDS = 40.0  # for this peer at one op: it tunes its kernels for each shape, in minutes


def steps(here: Here) -> list[Step]:
    benchmark = _benchmark()
    found = [Step(name, partial(_time, name), OWN_SECONDS if here.on_gpu else None) for name in benchmark.CASES]
    if not here.on_gpu:
        here.note("On a CPU: one thread, small sizes. benchmarks/ops/kernels.py measures a CPU properly.")
        return found
    if importlib.util.find_spec("fla") is None:
        here.skip(PEER, "it is not installed")
        return found
    peers = [name for name in benchmark.CASES if PEER in benchmark.CASES[name](256, "cuda").peers]
    return found + [Step(f"{name} of {PEER}", partial(_beside, name), PEER_SECONDS) for name in peers]


def _benchmark() -> ModuleType:
    """benchmarks/ops/kernels.py of the checkout: no distribution holds it."""
    if not (Path(package[0]) / "benchmarks").is_dir():
        raise ModuleNotFoundError(f"no benchmarks in {package[0]}", name="the benchmarks of a checkout")
    return importlib.import_module("longreach.benchmarks.ops.kernels")


def _time(name: str, here: Here) -> None:
    """A row for each length, as soon as it is measured."""
    benchmark = _benchmark()
    for length in LENGTHS if here.on_gpu else FEW:
        if here.left < LEAST_SECONDS:
            here.skip(f"{name} at {length:,} tokens", "the part's time was over")
            continue
        case = benchmark.CASES[name](length, here.device.type)
        passes = {"ours": case.ours} | {who: run for who, run in case.peers.items() if who not in LATER}
        taken = {who: _seconds(who, run, here) for who, run in passes.items()}
        floor = _floor(case.flops, here)
        memory = benchmark.peak_bytes(case.ours, here.device.type) / 2**20 if taken["ours"] else None
        here.row(
            "µs a token, forward + backward; the floor is the op's FLOPs at the rate of a plain matrix product",
            op=name,
            tokens=length,
            floor=floor / length * 1e6,
            **{who: None if seconds is None else seconds / length * 1e6 for who, seconds in taken.items()},
            **{"ours / floor": taken["ours"] and taken["ours"] / floor, "peak MiB": memory},
        )


def _beside(name: str, here: Here) -> None:
    """The op and this peer, taking turns."""
    benchmark = _benchmark()
    for length in LENGTHS:
        case = benchmark.CASES[name](length, here.device.type)
        ours, theirs = _seconds("ours", case.ours, here), _seconds(PEER, case.peers[PEER], here)
        here.row(
            f"µs a token, beside {PEER}",
            op=name,
            tokens=length,
            **{who: s and s / length * 1e6 for who, s in (("ours", ours), (PEER, theirs))},
            **{"ours / theirs": ours / theirs if ours and theirs else None},
        )


def _floor(flops: int, here: Here) -> float:
    """Seconds of a forward and a backward of 2.5 forwards at the rate of a matrix product."""
    benchmark = _benchmark()
    plain, of_product = benchmark.product(here.device.type)
    key = ("floor", 0)
    return (
        3.5
        * flops
        / of_product
        * benchmark.seconds({key: plain}, here.device.type, ROUNDS if here.on_gpu else ONCE)[key]
    )


def _seconds(who: str, run: object, here: Here) -> float | None:
    """The best time; None, and a word about it, where memory does not suffice or the peer refuses."""
    benchmark = _benchmark()
    try:
        best = benchmark.seconds({(who, 0): run}, here.device.type, ROUNDS if here.on_gpu else ONCE)
    except Exception as refused:
        if who == "ours":
            raise
        here.skip(f"{here.step}: {who}", f"{type(refused).__name__}: {str(refused).splitlines()[0]}")
        return None
    if not best:
        here.skip(f"{here.step}: {who}", "memory does not suffice")
    return best.get((who, 0))
