"""Modules of the working directory, for `_target_`: found last, so that they never stand in for another package."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OWN = ("conf", "kernels", "launch", "models", "parallel", "tests", "trainer")


class WorkingDirectoryFinder:
    """Finds top-level modules in the folder that the process works in.

    The scripts start Python with PYTHONSAFEPATH=1, which leaves that folder out of `sys.path`: the checkout's own
    folders have names of other packages (`kernels` is one that transformers looks for), and are left out here too.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            folder = os.getcwd()
        except OSError:  # the folder has been removed
            return None
        if path is not None or (name in OWN and Path(folder, "launch", "configuration", Path(__file__).name).exists()):
            return None
        return PathFinder.find_spec(name, [folder])


def use() -> None:
    """Makes the modules of the working directory importable in this process."""
    if not any(isinstance(finder, WorkingDirectoryFinder) for finder in sys.meta_path):
        sys.meta_path.append(WorkingDirectoryFinder())  # type: ignore[arg-type]
