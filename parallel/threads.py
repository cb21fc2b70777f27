"""Threads: ranks as threads of one process, whose collectives go through its memory, so that ranks share one device.

`run_as_threads(ranks, function)` runs a function on every rank. In it `Mesh.create` makes groups of threads, and what
takes a group (sequences, ops, models) runs as it does on processes, in forward and in backward.

One rank runs at a time, until it waits for another. Ranks share an interpreter anyway and a device's queue is filled
all the same; and what a process has only once (caches, Triton's interpreter, hooks of a module) is never used by two.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .waiting import Waits

Result = TypeVar("Result")

GRACE_SECONDS = 5.0  # what ranks that compute get to reach their next collective, after another one failed


def run_as_threads(ranks: int, function: Callable[[int], Result], *, timeout: float = 300.0) -> list[Result]:
    """Runs `function(rank)` on `ranks` threads; returns the results by rank.

    Tensors live on any device. CUDA work is queued on the current stream of the caller, in the order in which ranks
    run, and each rank's backward runs in its own thread. Grad mode and dispatch modes are those of a new thread.

    Where a rank raises, the others end at their next collective, and the first error is raised with its rank in a note.
    Raises RuntimeError where ranks wait for one another in vain or call different collectives, and TimeoutError, with
    the place where each rank stands, where they have not ended after `timeout` seconds.
    """
    world = _World(ranks)
    results: dict[int, Result] = {}
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run(rank: int) -> None:
        _local.rank = Rank(world, rank)
        if stream is not None:
            torch.cuda.set_stream(stream)  # also selects its device
        with world.turn:
            try:
                # Otherwise one thread of autograd runs the CUDA nodes of all ranks, and waits in the first collective.
                with torch.autograd.set_multithreading_enabled(False):
                    results[rank] = function(rank)
            except _Ended:
                pass
            except BaseException as error:
                error.add_note(f"on rank {rank} of {ranks}, which are threads")
                world.fail(error)
            world.end()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(ranks)]
    try:
        with _Modes():
            for thread in threads:
                thread.start()
            _join(threads, world, timeout)
    except BaseException as error:  # of the caller: an interrupt
        world.fail(error)
        raise
    if world.error is not None:
        raise world.error
    return [results[rank] for rank in range(ranks)]


class _Modes(TorchDispatchMode):
    """Puts back torch's notes of whether a dispatch mode is on, which are one for all threads.

    Modes of ranks that end in another order than they began in leave them wrong.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # ranks may compile within


def _join(threads: list[threading.Thread], world: _World, timeout: float) -> None:
    """Waits until the ranks have ended; no longer than the limit, or than GRACE_SECONDS after one failed."""
    deadline, failed = time.monotonic() + timeout, False
    while (alive := [thread for thread in threads if thread.is_alive()]) and time.monotonic() < deadline:
        alive[0].join(0.05)
        if world.error is not None and not failed:
            deadline, failed = time.monotonic() + GRACE_SECONDS, True
    if alive and not failed:
        stands = _stacks(alive)
        world.fail(TimeoutError(f"{len(threads)} ranks as threads have not ended after {timeout:g} s.\n{stands}"))


def _stacks(threads: list[threading.Thread]) -> str:
    frames = sys._current_frames()
    stacks = {thread.name: frames.get(thread.ident or 0) for thread in threads}
    return "\n".join(f"{name} stands at\n{''.join(traceback.format_stack(at))}" for name, at in stacks.items() if at)


class _Ended(BaseException):
    """Ends a rank that would wait for ranks of which one has failed; no error of its own."""


class _World:
    """What the ranks share. `turn` is held by the one that runs; only waiting lets another one run."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.turn = threading.Condition()
        self.error: BaseException | None = None
        self.ended = 0
        self.waiting: dict[int, tuple[str, Callable[[], bool]]] = {}
        self.meetings: dict[tuple[tuple[int, ...], int], dict[int, Any]] = {}
        self.messages: dict[tuple[tuple[int, ...], int, int, int], Tensor] = {}

    def wait(self, rank: int, what: str, ready: Callable[[], bool]) -> None:
        """Lets others run until `ready()`."""
        while self.error is None and not ready():
            self.waiting[rank] = what, ready
            self._check_progress()
            if self.error is None:
                self.turn.wait()
            del self.waiting[rank]
        if self.error is not None:
            raise _Ended

    def end(self) -> None:
        """Of a rank."""
        self.ended += 1
        self._check_progress()

    def fail(self, error: BaseException) -> None:
        """Ends all ranks; the first error is the one that is raised. Any thread may call it."""
        self.error = self.error or error
        if self.turn.acquire(timeout=GRACE_SECONDS):
            self.turn.notify_all()
            self.turn.release()

    def _check_progress(self) -> None:
        """Fails if no rank can go on."""
        waiting = self.waiting
        if waiting and len(waiting) + self.ended == self.ranks and not any(ready() for _, ready in waiting.values()):
            each = "; ".join(f"rank {rank} waits for {what}" for rank, (what, _) in sorted(waiting.items()))
            rest = f"; {self.ended} of {self.ranks} have ended" if self.ended else ""
            self.fail(RuntimeError(f"ranks wait for one another in vain: {each}{rest}"))


class Rank:
    """The rank that the calling thread is: its number among `ranks`, its groups, what it has sent, and its waits."""

    def __init__(self, world: _World, rank: int) -> None:
        self.rank, self.ranks, self.sent, self.waits = rank, world.ranks, Counter[str](), Waits()
        self._world = world
        self._groups: dict[tuple[int, ...], ThreadGroup] = {}

    def group(self, members: list[int] | range) -> ThreadGroup:
        """The group of these ranks, which this one is one of."""
        key = tuple(members)
        return self._groups.setdefault(key, ThreadGroup(self._world, key, self.rank))


_local = threading.local()


def this_rank() -> Rank | None:
    """The rank that the calling thread is; None outside `run_as_threads`."""
    return getattr(_local, "rank", None)


class ThreadGroup:
    """Some of the ranks, as one of them sees them: `rank` is its number in the group.

    What is received is a copy, never the sender's memory. Every rank of the group calls the same collectives in the
    same order, with tensors of the same shape and type; RuntimeError otherwise.
    """

    def __init__(self, world: _World, members: tuple[int, ...], rank: int) -> None:
        self.members, self.rank, self.size = members, members.index(rank), len(members)
        self._world, self._here, self._meetings = world, rank, 0
        self._sent, self._expected = Counter[int](), Counter[int]()

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """`out`, of as many elements as all x together, becomes the x of every rank in turn."""
        for part, received in zip(out.view(self.size, *x.shape), self._meet_alike("all_gather", x), strict=True):
            part.copy_(received)

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """`out[r]` becomes `x[this rank]` of rank r."""
        for part, received in zip(out, self._meet_alike("all_to_all", x), strict=True):
            part.copy_(received[self.rank])

    def all_to_all_rows(self, out: Tensor, x: Tensor, sends: list[int]) -> None:
        """`out` becomes the rows for this rank of every x in turn; `sends` says how many of x are for each rank."""
        counts = self._meet("all_to_all_rows", list(sends))
        parts = [given.split(of)[self.rank] for given, of in zip(self._meet("all_to_all", x), counts, strict=True)]
        received = torch.cat(parts)
        _check_alike("all_to_all_rows", out, received)
        out.copy_(received)

    def all_reduce(self, x: Tensor) -> None:
        """x becomes the sum over ranks, added up in their order."""
        total, *parts = self._meet_alike("all_reduce", x)
        for part in parts:
            total = total + part
        x.detach().copy_(total)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value of every rank, each a copy."""
        return self._meet("all_gather_object", value)

    def exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[Message]:
        """Sends tensors to ranks of the group; others are received in place once the messages are waited for."""
        for x, peer in sends:
            self._world.messages[self.members, self.rank, peer, self._sent[peer]] = x.detach().clone()
            self._sent[peer] += 1
        self._world.turn.notify_all()
        expected = []
        for x, peer in receives:
            expected.append(Message(self, x, peer, self._expected[peer]))
            self._expected[peer] += 1
        return expected

    def receive(self, x: Tensor, peer: int, number: int) -> None:
        """The message of this number from a rank of the group, into x."""
        messages, key = self._world.messages, (self.members, peer, self.rank, number)
        self._world.wait(self._here, f"a message from rank {self.members[peer]}", lambda: key in messages)
        received = messages.pop(key)
        _check_alike(f"message from rank {self.members[peer]}", x, received)
        x.detach().copy_(received)

    def _meet_alike(self, what: str, x: Tensor) -> list[Tensor]:
        met = self._meet(what, x)
        for received in met:
            _check_alike(what, x, received)
        return met

    def _meet(self, what: str, value: Any) -> list[Any]:
        """What every rank of the group brings to this meeting, copied, by rank."""
        self._meetings += 1
        key = self.members, self._meetings
        met = self._world.meetings.setdefault(key, {})
        met[self.rank] = what, value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
        self._world.turn.notify_all()
        self._world.wait(self._here, f"{what} of ranks {list(self.members)}", lambda: len(met) == self.size)
        self._world.meetings.pop(key, None)
        if len(calls := {name for name, _ in met.values()}) > 1:
            raise RuntimeError(f"every rank must call the same collective; got {' and '.join(sorted(calls))}")
        return [met[rank][1] for rank in range(self.size)]


def _check_alike(what: str, x: Tensor, received: Tensor) -> None:
    if (x.shape, x.dtype) != (received.shape, received.dtype):
        forms = " and ".join(f"{list(t.shape)} in {t.dtype}" for t in (x, received))
        raise RuntimeError(f"every rank must use tensors of one shape and type in {what}; got {forms}")


class Message:
    """A message under way to this rank."""

    def __init__(self, group: ThreadGroup, x: Tensor, peer: int, number: int) -> None:
        self._group, self._x, self._peer, self._number = group, x, peer, number

    def wait(self) -> None:
        self._group.receive(self._x, self._peer, self._number)
