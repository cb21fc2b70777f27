"""Ranks for tests: `run_ranks` runs a function on gloo ranks that stay alive from one test to the next.

A forkserver with torch and the models loaded (and the trainer, where its tests run too) makes one pool of processes a
world size; a pool keeps its process group (a FileStore, so no ports), one thread a rank. The limit is kept by the
parent: a pool that does not answer in time, or in which a rank failed, is killed and made anew, and the report says
where each silent rank stood.

`run_threads` runs the same function on threads of this process, which cost no start: for whatever needs only the
results of collectives.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

GRACE_SECONDS = 2.0  # what the others get to finish after one rank failed: they may wait for it in a collective
START_SECONDS = 180.0  # what a pool gets to start, apart from the limit of the function


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds every rank's report."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Runs `function(rank, world, *args)` on `world` ranks of torch.distributed (gloo); returns the results by rank.

    `function` must stand at module level of its file; arguments and results are pickled. Raises RankError where a rank
    raises, dies or has not answered after `timeout` seconds.
    """
    if world not in _pools:
        _pools[world] = _Pool(world)
    try:
        return _pools[world].run(function, args, timeout)
    except BaseException:
        _pools.pop(world).kill()
        raise


def run_threads(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """The same on threads of this process, which start at once: `function` may stand anywhere."""
    from longreach.parallel.threads import run_as_threads

    return run_as_threads(world, lambda rank: function(rank, world, *args), timeout=timeout)


class _Pool:
    def __init__(self, world: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longreach-ranks-"))
        context = forkserver()
        self.processes, self.connections = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(self.folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self._collect(START_SECONDS, "start")

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        source = (function.__module__, inspect.getfile(function), function.__qualname__)
        message = pickle.dumps((list(sys.path), source, pickle.dumps(args)))
        for connection in self.connections:
            connection.send_bytes(message)
        return self._collect(timeout, function.__qualname__)

    def _collect(self, timeout: float, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, result = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.processes[rank].join(1)
                    succeeded, result = False, f"died with exit code {self.processes[rank].exitcode}"
                (results if succeeded else failures)[rank] = result
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            why = "waited for a failed rank" if failures else f"did not end within {timeout} s"
            failures[rank] = f"{why}; it stood at\n{self._stack(rank)}"
        if failures:
            report = "\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items()))
            raise RankError(f"{name} on {len(self.processes)} ranks:\n{report}")
        return [results[rank] for rank in range(len(self.processes))]

    def _stack(self, rank: int) -> str:
        file = self.folder / f"stack-{rank}"
        process = self.processes[rank]
        if process.pid is None or not process.is_alive() or not file.exists():
            return "(nothing: it is not alive)"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return file.read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)


def forkserver() -> Any:
    """The context of multiprocessing whose processes begin with everything imported that takes seconds."""
    modules = ["torch", "torch.distributed", "longreach.launch.configuration", "longreach.models.language_model"]
    if "longreach.trainer.engine" in sys.modules:
        modules += ["torch._inductor.compile_fx", "longreach.launch.train", "matplotlib.figure"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


_pools: dict[int, _Pool] = {}


@atexit.register
def _kill_all() -> None:
    while _pools:
        _pools.popitem()[1].kill()


def _serve(rank: int, world: int, folder: str, connection: Connection) -> None:
    import torch
    from torch import distributed

    stack_file = open(Path(folder, f"stack-{rank}"), "w")  # noqa: SIM115 (faulthandler writes to it as long as we live)
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # as pytest is told to
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store = distributed.FileStore(str(Path(folder, "store")), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            paths, (module, file, name), packed = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            sys.path[:] = paths
            function = getattr(_load(module, file), name)
            answer = pickle.dumps((True, function(rank, world, *pickle.loads(packed))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _load(name: str, file: str) -> ModuleType:
    # By file, not by name alone: two folders of tests may hold a module of one name.
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == file:
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
