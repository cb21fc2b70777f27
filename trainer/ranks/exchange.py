"""Exchange: small values between all ranks, and waiting for one another's preparations."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.collectives import agree, all_gather
from ...parallel.mesh import Mesh

BEAT_S = 1.0
SILENT_S = 120.0  # after which a rank that gives no sign of life is lost
FAIL_TOGETHER_S = 3.0
POLLS_S = (0.02, 1.0)  # between two looks, at first and at most

Result = TypeVar("Result")

_preparations = count()  # every rank takes part in each, in the same order


def gather(mine: Tensor, mesh: Mesh) -> Tensor:
    """`[ranks, n]` of every rank's `[n]`, on their device: sums of it do not depend on how a reduction runs."""
    if mesh.world_size == 1:
        return mine.unsqueeze(0)
    gathered = mine.new_empty(mesh.world_size, len(mine))
    all_gather(gathered.view(-1), mine)
    return gathered


def gather_numbers(numbers: list[float], mesh: Mesh) -> Tensor:
    """float64 `[ranks, n]` on the host: every rank's numbers."""
    return gather(torch.tensor(numbers, dtype=torch.float64), mesh)


def from_first_rank(value: Any, mesh: Mesh) -> Any:
    """The first rank's value, on every rank."""
    if mesh.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]


def together(mesh: Mesh, action: Callable[[], Result]) -> Result:
    """`action()` on every rank; a ValueError of any rank is raised on all, so that none waits for one that stopped."""
    error, result = None, None
    try:
        result = action()
    except ValueError as raised:
        error = str(raised)
    agree(error, mesh.world_size)
    return cast(Result, result)


def prepare(mesh: Mesh, action: Callable[[], Result]) -> Result:
    """`together` for work that may take one rank hours longer than another, as tokenising on each node does.

    No rank waits in a collective, whose time-out would run: a rank that is done waits at the store, where those that
    work give signs of life. What fails on one rank is raised on all that wait, a ValueError as such. Raises
    RuntimeError where a rank gives no sign of life for SILENT_S.
    """
    if mesh.world_size == 1:
        return action()
    meeting = _Meeting(mesh, f"longreach/preparation/{next(_preparations)}")
    try:
        with meeting.signs_of_life():
            result = action()
    except BaseException as error:
        meeting.fail(error)
        raise
    meeting.wait()
    return result


class _Meeting:
    """Ranks that come when they are done, at the store that the process group was made with."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.rank, self.ranks, self.name = mesh.rank, mesh.world_size, name
        self.store = dist.distributed_c10d._get_default_store()

    @contextmanager
    def signs_of_life(self) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT_S):
                self.store.add(f"{self.name}/beats/{self.rank}", 1)

        thread = threading.Thread(target=beat, daemon=True, name="signs of life")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Tells the others why; waits a little, so that ranks that all fail alike end together."""
        told = isinstance(error, ValueError), str(error) or type(error).__name__
        self.store.set(f"{self.name}/failure", json.dumps([self.rank, *told]))
        self.store.add(f"{self.name}/come/{self.rank}", 1)
        deadline = time.monotonic() + FAIL_TOGETHER_S
        for rank in range(self.ranks):
            while not self._has_come(rank) and time.monotonic() < deadline:
                time.sleep(POLLS_S[0])

    def wait(self) -> None:
        """Until all have come. Where several are missing it is the first of them that is listened to."""
        self.store.add(f"{self.name}/come/{self.rank}", 1)
        for rank in range(self.ranks):
            beats, heard, pause = -1, time.monotonic(), POLLS_S[0]
            while not self._has_come(rank):
                self._raise_failure()
                if (now := self.store.add(f"{self.name}/beats/{rank}", 0)) != beats:
                    beats, heard = now, time.monotonic()
                elif time.monotonic() - heard > SILENT_S:
                    raise RuntimeError(f"Timed out waiting for rank {rank}, silent while it prepared its data")
                time.sleep(pause)
                pause = min(2 * pause, POLLS_S[1])
        self._raise_failure()

    def _has_come(self, rank: int) -> bool:
        return self.store.add(f"{self.name}/come/{rank}", 0) > 0

    def _raise_failure(self) -> None:
        if self.store.check([f"{self.name}/failure"]):
            rank, refused, message = json.loads(self.store.get(f"{self.name}/failure"))
            raise ValueError(message) if refused else RuntimeError(f"rank {rank} failed: {message}")
