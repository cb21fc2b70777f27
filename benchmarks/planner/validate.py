"""The planner beside what real steps take on this machine: the peak of memory of a rank, and bytes sent, by setting.

    python benchmarks/planner/validate.py [--cases 0 1 2 …] [--write]

Each setting is measured in processes of its own over gloo, in float32 with one thread each, by the engine that trains.
Memory: by how much the largest resident set of a rank in a step exceeds that before the engine was made, in a process
in which the same engine has taken a step and was closed: what libraries hold from their first use on (code, threads,
compiled kernels) is no part of it. The least of two steps counts, since a thread of gloo may let go of a message late.
Bytes: what the collectives of sequence parallelism count, and the arguments of every collective that DeepSpeed calls.
Both are those of steps after the second, before which ZeRO-3 compares the ranks' modules, once.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib
import json
import multiprocessing
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longreach.benchmarks.machine import resident
from longreach.benchmarks.planner.even import EvenExperts
from longreach.benchmarks.planner.recorded import Recorded
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.collectives import counting
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.engine import Engine, OptimizerSettings
from longreach.trainer.memory.account import account
from longreach.trainer.memory.allocations import size
from longreach.trainer.planning.sending import calls
from longreach.trainer.planning.zero import gathered_at_once, zero_sends
from longreach.trainer.ranks import processes
from longreach.trainer.ranks.settings import layout_of, strategy_of, ulysses_ranks
from longreach.trainer.settings import Settings

RESULTS = Path(__file__).parent.parent / "results" / "planner_cpu.md"
KEPT = RESULTS.with_suffix(".json")
MIXERS: dict[str, Callable[..., Any]] = {
    "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2),
    "window": partial(SoftmaxAttention, heads=4, kv_heads=2, window=512),
    "lightning": partial(LightningAttention, heads=4),
    "gated_deltanet": partial(GatedDeltaNet, heads=4, key_dim=64),
}
UNCOUNTED, COUNTED = 2, 2  # steps
# Memory that is let go of goes back to the system, so that the resident set is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
HEAD = """\
| ranks | a row | ZeRO | checkpointing | layers | strategy | tokens | predicted | measured | ratio | \
sequence bytes, predicted | measured | ZeRO bytes, predicted | measured |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


class Case(NamedTuple):
    """A setting; `sequence` of the ranks share a row, of `tokens` for each of them."""

    ranks: int
    sequence: int
    stage: int
    checkpointing: str
    mixers: tuple[str, ...]
    strategy: str = "ring"
    tokens: int = 2048
    experts: int = 1  # ranks that share out eight experts in place of each dense layer
    ahead: int = 0  # modules of multi-token prediction

    def settings(self) -> Settings:
        made = Settings()
        made.parallel.sequence, made.parallel.layout = self.sequence, "zigzag" if self.sequence > 1 else "contiguous"
        if self.strategy == "ulysses":
            made.parallel.attention = made.parallel.recurrent = "ulysses"
        elif self.strategy == "gather":
            made.parallel.attention = "gather"
        made.data.sequence_length, made.data.rows_per_micro_batch = self.tokens * self.sequence, 1
        made.data.rows_per_step, made.parallel.experts = self.ranks // self.sequence, self.experts
        made.checkpoint.asynchronous = False  # no copy is kept for saving
        made.engine = type(made.engine)(zero_stage=self.stage)
        return made

    def build(self) -> LanguageModel:
        """Four layers, 128 wide, with 512 hidden units, or eight experts of 128 of which a token runs two, in turn, and
        a vocabulary of 2,048.
        """
        dense, experts = partial(SwiGLU, hidden=512), partial(EvenExperts, hidden=128, shared_hidden=128)
        return LanguageModel(
            vocabulary=2048,
            width=128,
            depth=4,
            pattern=[name for name in self.mixers for _ in range(4 // len(self.mixers))],
            mixers={name: MIXERS[name] for name in self.mixers},
            feed_forward=dense if self.experts == 1 else experts,
            multi_token_prediction=self.ahead,
            activation_checkpointing=self.checkpointing,
        )

    @property
    def layers(self) -> str:
        """As the table shows them."""
        more = [f"experts on {self.experts}"] if self.experts > 1 else []
        return ", ".join([" + ".join(self.mixers), *more, *([f"{self.ahead} tokens ahead"] if self.ahead else [])])


HYBRID = ("lightning", "window")
CASES = [
    Case(1, 1, 0, "none", HYBRID),
    Case(1, 1, 1, "full", HYBRID),
    Case(1, 1, 1, "mixing", ("softmax",), tokens=1024),
    Case(1, 1, 2, "full", ("gated_deltanet",)),
    Case(2, 1, 0, "full", ("lightning",)),
    Case(2, 1, 1, "none", ("softmax",), tokens=1024),
    Case(2, 1, 2, "full", HYBRID),
    Case(2, 1, 3, "full", ("lightning",)),
    Case(2, 2, 0, "none", ("lightning",)),
    Case(2, 2, 1, "full", ("softmax",), tokens=1024),
    Case(2, 2, 1, "mixing", HYBRID),
    Case(2, 2, 2, "full", ("gated_deltanet",)),
    Case(2, 2, 3, "full", HYBRID),
    Case(2, 2, 1, "full", ("softmax",), "gather", 1024),
    Case(2, 2, 1, "full", ("lightning", "softmax"), "ulysses", 1024),
    Case(4, 2, 1, "full", HYBRID, tokens=1024),
    Case(4, 4, 2, "mixing", ("lightning", "softmax"), tokens=1024),
    Case(4, 4, 3, "none", ("gated_deltanet", "window"), tokens=1024),
    Case(2, 2, 1, "full", HYBRID, experts=2),
    Case(2, 1, 2, "none", HYBRID, experts=2),
    Case(4, 2, 3, "full", HYBRID, tokens=1024, experts=2),
    Case(4, 2, 1, "mixing", HYBRID, tokens=1024, experts=4),
    Case(2, 2, 1, "full", HYBRID, ahead=2),
]


def predicted(case: Case) -> tuple[int, list[int], int]:
    """The peak of a rank, the bytes that each rank of the first row sends, and those of ZeRO."""
    settings = case.settings()
    made = account(case.build, settings, case.ranks, torch.device("cpu"), shortest=1024)
    sends = [
        sum(call.bytes * number for call, number in calls(case.build, settings, rank).items())
        for rank in range(case.sequence)
    ]
    with torch.device("meta"):
        model = case.build()
    zero = zero_sends(model, settings, case.ranks)
    return made.peak() + gathered_at_once(model, settings), sends, sum(each.bytes for each in zero)


def _resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def measure(rank: int, ranks: int, port: int, numbers: list[int], told: Connection) -> None:
    """Takes steps of each setting on this rank, and sends what one takes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = processes.start(10.0)
    with Recorded() as recorded:
        small = partial(LanguageModel, vocabulary=64, width=16, depth=1, pattern=["lightning"])
        first = Engine(
            lambda: small(mixers={"lightning": partial(LightningAttention, heads=1)}), settings=Settings().engine,
            optimizer=OptimizerSettings(), mesh=Mesh.create(), device=device,
        )  # fmt: skip
        first.close()
        for number in numbers:
            told.send(_measured(CASES[number], device, recorded))
    processes.end()


def _measured(case: Case, device: torch.device, recorded: Recorded) -> dict[str, Any]:
    settings = case.settings()
    mesh = Mesh.create(case.sequence, ulysses_ranks(settings.parallel), case.experts)
    layout = layout_of(settings.parallel, settings.data.sequence_length)

    def step(engine: Engine) -> None:
        seq = Sequence.shared(Documents.whole(1, layout.length), layout, mesh, strategy_of(settings.parallel))
        ids = seq.shard(torch.arange(layout.length).remainder(2048).unsqueeze(0))
        loss, _, reports = engine(ids, seq, ids, False, True)
        reported = sum((reports[path] for path in engine.module.losses), start=loss)
        engine.backward(reported, layout.length * mesh.data_ranks)
        engine.step(1e-3)

    def make() -> Engine:
        return Engine(case.build, settings=settings.engine, optimizer=OptimizerSettings(), mesh=mesh, device=device)

    engine = make()
    for _ in range(UNCOUNTED):
        step(engine)
    engine.close()
    del engine
    before, peaks = _resident(), []
    engine = make()
    for _ in range(UNCOUNTED):
        step(engine)
    for _ in range(COUNTED):
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is that of now
        recorded.bytes.clear()
        with counting() as sent:
            step(engine)
        peaks.append(resident("VmHWM") - before)
    zero = sum(recorded.bytes.values()) - sent["sum"]  # of the sequence's own all-reduces, which the recorder sees too
    found = {"rank": mesh.rank, "memory": min(peaks), "sequence": sum(sent.values()), "zero": zero}
    found["calls"] = dict(recorded.bytes)
    engine.close()
    return found


def measured(ranks: int, numbers: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """For each setting, as it ends, what each rank says. The settings have so many ranks, all of them.

    Ranks are forked, so that libraries are imported once; the parent must not have run anything by then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends, ran = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        ran.append(context.Process(target=measure, args=(rank, ranks, port, numbers, theirs), daemon=True))
        ran[-1].start()
        theirs.close()
        ends.append(ours)
    for number in numbers:
        yield number, [end.recv() for end in ends]
    for process in ran:
        process.join()


def row(number: int, found: list[dict[str, Any]]) -> str:
    """A line of the table."""
    case = CASES[number]
    peak, sends, zero = predicted(case)
    memory = max(each["memory"] for each in found)
    counted = [each["sequence"] for each in sorted(found, key=lambda each: each["rank"])][: case.sequence]
    cells = [
        case.ranks, case.sequence, case.stage, case.checkpointing, case.layers, case.strategy,
        f"{case.tokens:,}", size(peak), size(memory), f"{peak / memory:.3f}", " ".join(f"{x:,}" for x in sends),
        " ".join(f"{x:,}" for x in counted), f"{zero:,}", " ".join(f"{x:,}" for x in {e["zero"] for e in found}),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--write", action="store_true", help="settings that the page has are not measured again")
    chosen = parser.parse_args()
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # read when a process starts
        os.environ |= MALLOC | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    importlib.import_module("deepspeed")
    kept = _kept() if chosen.write else {}
    cases = [number for number in chosen.cases if str(number) not in kept]
    groups = [[number for number in cases if CASES[number].ranks == ranks] for ranks in (1, 2, 4)]
    for numbers in filter(None, groups):
        for number, of_ranks in measured(CASES[numbers[0]].ranks, numbers):
            kept[str(number)] = {"ranks": of_ranks}
            print(number, of_ranks, flush=True)
            _keep(kept, chosen.write)
    print(HEAD, flush=True)
    for number in chosen.cases:
        of = kept[str(number)]
        of["row"] = of.get("row") or row(number, of["ranks"])
        print(of["row"], flush=True)
        _keep(kept, chosen.write)
    if chosen.write:
        kept = _kept()
        _write([kept[key]["row"] for key in sorted(kept, key=int) if "row" in kept[key]])


def _kept() -> dict[str, Any]:
    """What earlier runs measured and predicted: a run that ends early loses nothing."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def _keep(kept: dict[str, Any], write: bool) -> None:
    if write:
        KEPT.write_text(json.dumps(_kept() | kept, indent=1) + "\n")


def _write(rows: list[str]) -> None:
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores; torch {torch.__version__}; one thread a rank"
    parts = [
        "# The planner beside what steps take",
        f"`python benchmarks/planner/validate.py --write`, {datetime.date.today()}; {machine}; float32, AdamW, gloo.",
        f"{Case.build.__doc__} Tokens are those of a rank. Memory is that of a rank at the peak of a step: predicted "
        "by the account, measured as the growth of the resident set in a process that has run the same engine before. "
        "Bytes are those that each rank of a row sends in a step for its sequence, and those that each rank sends for "
        "ZeRO, as rings send them.",
        "\n".join([HEAD, *rows]) + "\n",
    ]
    RESULTS.write_text("\n\n".join(parts))


if __name__ == "__main__":
    main()
