"""Ranks: processes of torch.distributed on this machine, started once, which then run one function after another."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 2.0  # for the others to finish after one rank failed: they may wait for it in a collective
START_SECONDS = 240.0
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "longreach.trainer.diagnosis.training"]


class RankFailure(RuntimeError):
    """A rank raised, died or did not answer in time (`silent`); the message is the first such rank's."""

    def __init__(self, message: str, *, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Ranks:
    """`world` processes, one thread each, in one process group (gloo; with `cuda` nccl besides, one GPU per rank).

    prepare: "module:function", called on every rank before anything else; what tests plant faults with.
    The limits are kept by this process: where one rank fails or is silent, all are ended and RankFailure is raised.
    """

    def __init__(self, world: int, *, cuda: bool = False, prepare: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="longreach-doctor-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.processes, self.connections = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, str(self.folder), theirs, cuda, prepare)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self._collect(START_SECONDS, "start")

    def run(self, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        """`function(*args)` on every rank; the results by rank. It must stand at module level."""
        message = pickle.dumps((function, args))
        for connection in self.connections:
            connection.send_bytes(message)
        return self._collect(timeout, function.__name__)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stand(self, rank: int) -> str:
        """Where a silent rank is: its innermost frames of this package."""
        process, file = self.processes[rank], self.folder / f"stack-{rank}"
        if process.pid is None or not process.is_alive() or not file.exists():
            return "is not alive"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        frames = re.findall(r'File ".*?/((?:parallel|models|kernels)/[^"]+)", line (\d+) in (\w+)', file.read_text())
        return "stands in " + " < ".join(f"{name} ({path}, line {line})" for path, line, name in frames[:4])

    def _collect(self, timeout: float, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
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
                if succeeded:
                    results[rank] = result
                else:
                    failures.append(f"rank {rank}: {result}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures or waiting:
            silent = [f"rank {rank} {self._stand(rank)}" for rank in sorted(waiting.values())]
            self.close()
            if failures:
                raise RankFailure(failures[0])
            raise RankFailure(f"{name}: no answer in {timeout:g} s; {'; '.join(silent)}", silent=True)
        return [results[rank] for rank in range(len(self.processes))]


def _serve(rank: int, world: int, folder: str, connection: Connection, cuda: bool, prepare: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    stack = open(Path(folder, f"stack-{rank}"), "w")  # noqa: SIM115 (faulthandler writes to it as long as we live)
    faulthandler.register(signal.SIGUSR1, file=stack)
    try:
        _join(rank, world, folder, cuda)
        if prepare is not None:
            module, _, name = prepare.partition(":")
            getattr(importlib.import_module(module), name)()
        answer: tuple[bool, Any] = True, None
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send_bytes(pickle.dumps(answer))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, args = pickle.loads(message)
            answer = True, function(*args)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).strip() or "no message"
            answer = False, f"{type(error).__name__}: {said} ({Path(place.filename).name}, line {place.lineno})"
        connection.send_bytes(pickle.dumps(answer))


def _join(rank: int, world: int, folder: str, cuda: bool) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if cuda:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=distributed.FileStore(str(Path(folder, "store")), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
