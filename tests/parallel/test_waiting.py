"""How long ranks wait for one another, by a clock that the tests turn."""

import itertools
import threading
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_threads

from longreach.kernels.documents import Documents
from longreach.parallel import collectives, waiting
from longreach.parallel.collectives import Gathering, all_to_all, all_to_all_rows, sum_over_ranks, waits
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.waiting import Waits

CUDA = torch.device("cuda")
LAYOUT = Layout(8, 2, 1)


class Clock:
    """Stands still but for what the test adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(waiting.time, "perf_counter", lambda: self.now)


def test_waiting_counts_and_computing_beside_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Late:
        def wait(self) -> None:
            clock.now += 5.0

    monkeypatch.setattr(collectives, "all_gather", lambda *arguments, **named: Late())
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: [Late(), Late()])
    monkeypatch.setattr(dist, "P2POp", lambda *arguments, **named: None)
    seq = Sequence.rehearsal(Documents.whole(1, 8), LAYOUT, Strategy())
    x = torch.zeros(4)
    Gathering(x, seq).wait()  # of an evaluation, say
    with waits().counting():
        gathering, works = Gathering(x, seq), collectives.exchange([(x, 1)], [(x, 1)], seq)
        clock.now += 3.0
        gathering.wait()
        clock.now += 2.0
        collectives.finish(works)
    assert waits().take() == 15.0
    assert waits().take() == 0.0


def waited(rank: int, world: int) -> list[float]:
    """How many waits each collective has, by a clock that goes on by one whenever it is looked at."""
    mesh, x = Mesh.create(world), torch.ones(2, 3)
    group = mesh.sequence_group
    seq = Sequence(Documents.whole(1, 8), LAYOUT, rank, group)
    counted = []
    for collective in (
        lambda: Gathering(x, seq).wait(),
        lambda: all_to_all(x, group),
        lambda: all_to_all_rows(x, [1, 1], [1, 1], group),
        lambda: sum_over_ranks(x, seq),
        lambda: collectives.finish(collectives.exchange([(x, 1 - rank)], [(torch.empty_like(x), 1 - rank)], seq)),
        lambda: collectives.finish(collectives.exchange([], [], seq)),
    ):
        with waits().counting():
            collective()
        counted.append(waits().take())
    return counted


def test_every_collective_is_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = defaultdict[int, Any](itertools.count)  # a rank's own
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: float(next(clocks[threading.get_ident()])))
    assert run_threads(2, waited) == 2 * [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]


def test_a_gpu_is_asked_for_nothing_that_it_has_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose time each event takes; the device reaches them one by one."""
    made: list[Any] = []
    stream = {"time": 0.0, "reached": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self) -> None:
            self.at = stream["time"]

        def query(self) -> bool:
            return self.at <= stream["reached"]

        def elapsed_time(self, end: Any) -> float:
            assert self.query()
            assert end.query()
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = Waits()

    def step() -> None:
        with own.counting():
            for milliseconds in (100.0, 300.0):
                stream["time"] += 1000.0
                with own.measured(CUDA):
                    stream["time"] += milliseconds

    step()
    assert own.take() == 0.0
    stream["reached"] = 1100.0  # the first wait has ended
    assert own.take() == pytest.approx(0.1)
    stream["reached"] = 2399.0
    assert own.take() == 0.0
    step()
    stream["reached"] = stream["time"]
    assert own.take() == pytest.approx(0.3 + 0.4)
    step()
    assert len(made) == 6  # those of the waits that have ended are used again
