"""Background: a checkpoint is copied to the host's memory while training waits, and written while it goes on.

Of torch's own, `torch.distributed.checkpoint.async_save`, nothing is used: see `docs/checkpoints.md`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.mesh import Mesh
from ..engine import Engine
from ..ranks.exchange import gather_numbers
from .checkpoint import PIECE, Shapes, Share, open_target
from .commit import Retention, Target, Written, commit, entries, unwritten
from .stored import CheckpointError
from .tensor_files import TensorWriter

NICENESS = 10  # of the thread that writes, on Linux: where cores are few, those that train go first
POLLS_S = (0.005, 0.5)  # between two looks at what other ranks or the thread have done, at first and at most
ABANDON_SECONDS = 2.0  # what the thread gets to remove what it has written

_saves = count()  # every rank begins each, in the same order


class Background:
    """Checkpoints as `checkpoint.save` writes them, each by a thread of every rank; at most one at a time.

    The threads meet at the store of the default process group, not in collectives, which are training's. Every rank
    calls `begin` and `wait`, in the same order; `news` and `settle` concern this rank alone.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._copy: _HostCopy | None = None
        self._writing: _Writing | None = None
        self._told, self._under_way = True, False

    def begin(
        self,
        directory: Path,
        state: dict[str, Any],
        retention: Retention,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Copies the engine's state, and returns while it is being written; the save before must have been waited for.

        beside: as of `checkpoint.save`; called later, so that it may look at nothing that changes. Raises
        CheckpointError on every rank if one cannot begin.
        """
        assert not self._under_way, "wait() for the one before"
        engine, share, error = self.engine, Share(self.engine), None
        try:
            if self._copy is None or self._copy.files != share.files:
                self._copy = None  # both together may not fit
                self._copy = _HostCopy(share.files, pinned=engine.device.type == "cuda")
        except (RuntimeError, MemoryError) as failure:
            error = f"no memory for a copy on the host ({failure}); checkpoint.asynchronous=false needs none"
        target = open_target(directory, state["step"], engine.mesh, error)
        assert self._copy is not None
        engine.create_moments()
        self._copy.take(share)
        index = {"state": deepcopy(state), "adam_steps": engine.adam_steps}
        self._writing = _Writing(self._copy, target, index, retention, beside, engine.mesh)
        self._told, self._under_way = False, True

    def news(self) -> tuple[Path, CheckpointError | None] | None:
        """The path of a save that has ended on this rank, and why it has failed, if it has; told once."""
        if self._told or self._writing is None or self._writing.running:
            return None
        self._told = True
        return self._writing.target.path, self._writing.error

    def wait(self) -> None:
        """Returns when the save that was begun, if any, has ended on all ranks.

        In short rounds: a rank that is lost ends the others' waiting, as in any collective.
        """
        if not self._under_way or self._writing is None:
            return
        writing, pause = self._writing, POLLS_S[0]
        while True:
            running, broken = gather_numbers([writing.running, writing.broken], self.engine.mesh).T.bool()
            if not running.any():
                break
            if broken.any():  # nobody will tell the others
                writing.end(0.0)
            time.sleep(pause)
            pause = min(2 * pause, POLLS_S[1])
        self._under_way = False

    def settle(self, seconds: float) -> None:
        """Gives a save under way this long to end, and abandons it then: for the end of a run that has failed."""
        if self._writing is not None:
            self._writing.end(seconds)


class _HostCopy:
    """The tensors of files in the host's memory, taken once and used by every save.

    pinned: so that a GPU copies at its full speed.
    """

    def __init__(self, files: dict[str, Shapes], *, pinned: bool) -> None:
        self.files = files
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for file, shapes in files.items():
            sizes = [math.prod(shape) for shape in shapes.values()]
            flat = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=pinned)
            self.tensors[file] = dict(zip(shapes, flat.split(sizes), strict=True))

    def take(self, share: Share) -> None:
        """Copies what the engine holds now; every rank calls it."""
        places = {file: dict.fromkeys(tensors, 0) for file, tensors in self.tensors.items()}
        for file, key, values in share:
            start = places[file][key]
            self.tensors[file][key][start : start + len(values)].copy_(values, non_blocking=True)
            places[file][key] = start + len(values)
        if share.engine.device.type == "cuda":
            torch.cuda.synchronize(share.engine.device)


class _Abandoned(Exception):
    """The run ends before the checkpoint is written."""


class _Writing:
    """One checkpoint that this rank's thread writes and, on the first rank, commits when all ranks have written.

    error: why it could not be written, when it has ended. broken: whether this rank has ended without a word to the
    others.
    """

    def __init__(
        self,
        copy: _HostCopy,
        target: Target,
        index: dict[str, Any],
        retention: Retention,
        beside: Callable[[Path], None] | None,
        mesh: Mesh,
    ) -> None:
        self.target = target
        self.error: CheckpointError | None = None
        self.broken = False
        self._copy, self._index, self._retention, self._beside = copy, index, retention, beside
        self._rank, self._ranks, self._notes = mesh.rank, mesh.world_size, _Notes(mesh.world_size)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._thread.is_alive()

    def end(self, seconds: float) -> None:
        """Waits so long for the thread, and abandons the checkpoint then."""
        self._thread.join(seconds)
        self._ending.set()
        self._thread.join(ABANDON_SECONDS)

    def _run(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            problem = self._finish(self._write())
        except _Abandoned:
            problem = "it was abandoned, as the run ends"
            if self._rank == 0:
                shutil.rmtree(self.target.temporary, ignore_errors=True)
        except RuntimeError as failure:  # of the store: its host is lost
            problem, self.broken = f"the ranks' store does not answer ({failure})", True
        except Exception as failure:  # of any other kind: a thread that ended in silence would pass for one that wrote
            problem, self.broken = f"{type(failure).__name__}: {failure}", True
        self.error = unwritten(self.target.path, problem) if problem else None

    def _write(self) -> Written:
        """This rank's files, and what went wrong with them, of any kind: the others would wait for word of it."""
        writers: list[TensorWriter] = []
        try:
            self.target.temporary.mkdir(exist_ok=True)
            for file, shapes in self._copy.files.items():
                writers.append(TensorWriter(self.target.temporary / file, shapes))
                for key, values in self._copy.tensors[file].items():
                    for piece in values.split(PIECE):
                        self._look_up()
                        writers[-1].write(key, piece)
                writers[-1].close()
        except _Abandoned:
            raise
        except Exception as failure:
            return {}, str(failure)
        finally:
            for writer in writers:
                writer.abandon()
        return entries(writers), None

    def _finish(self, mine: Written) -> str | None:
        """Brings the ranks' words together; the first commits the checkpoint and says how that went."""
        self._notes.put(f"written/{self._rank}", mine)
        if self._rank == 0:
            written = [self._wait_for(f"written/{rank}", remove=True) for rank in range(self._ranks)]
            problem = commit(self.target, self._index, written, self._retention, self._beside)
            self._notes.put("end", problem)
        return self._wait_for("end")

    def _wait_for(self, name: str, *, remove: bool = False) -> Any:
        pause = POLLS_S[0]
        while (found := self._notes.look(name)) is None:
            self._look_up()
            time.sleep(pause)
            pause = min(2 * pause, POLLS_S[1])
        if remove:
            self._notes.remove(name)
        return found[0]

    def _look_up(self) -> None:
        if self._ending.is_set():
            raise _Abandoned


class _Notes:
    """What ranks leave for one another at the store that they met at: asking for it blocks nobody."""

    def __init__(self, ranks: int) -> None:
        store = dist.distributed_c10d._get_default_store() if ranks > 1 else dist.HashStore()
        self._store = dist.PrefixStore(f"longreach/checkpoint/{next(_saves)}", store)

    def put(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def look(self, name: str) -> tuple[Any] | None:
        """What was put there, or None."""
        return (json.loads(self._store.get(name)),) if self._store.check([name]) else None

    def remove(self, name: str) -> None:
        self._store.delete_key(name)
