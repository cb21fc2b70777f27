"""Commands of the project in processes that have everything imported when they begin.

`Command("longreach.launch.train", "trainer.steps=4", folder=…)` is what `python -m longreach.launch.train
trainer.steps=4` is in that folder, without the seconds of its imports: a forkserver, which the ranks of `distributed`
share, has done them. It is used as a `subprocess.Popen` is.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distributed import forkserver


class Command:
    """`python -m module arguments…` in a folder, with these variables for its environment or those of this process.

    stderr: subprocess.STDOUT or PIPE.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        folder: Path,
        environment: dict[str, str] | None = None,
        stderr: int = subprocess.STDOUT,
    ) -> None:
        self._written = tempfile.TemporaryDirectory(prefix="longreach-command-")
        self._files = [Path(self._written.name, name) for name in ("output", "errors")]
        outputs = [str(self._files[0 if stderr == subprocess.STDOUT else number]) for number in (0, 1)]
        given = (module, list(arguments), str(folder), environment or dict(os.environ), outputs)
        self._process = forkserver().Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended. Raises TimeoutExpired."""
        self._process.join(timeout)
        said, errors = (file.read_text() if file.exists() else "" for file in self._files)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python -m …", timeout or 0.0, said, errors)
        return said, errors

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run(module: str, *arguments: str, folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A command to its end, with its output and its standard error apart."""
    command = Command(module, *arguments, folder=folder, stderr=subprocess.PIPE, **settings)
    try:
        said = command.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    assert command.returncode is not None
    return subprocess.CompletedProcess([module, *arguments], command.returncode, *said)


def _run(module: str, arguments: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    import torch

    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # of which it would be told otherwise that it runs twice
    runpy.run_module(module, run_name="__main__", alter_sys=True)
