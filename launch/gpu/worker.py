"""Worker: a process that runs steps of one part, as it is told which.

    python -m longreach.launch.gpu.worker PART MODULE DEADLINE PIPE FOLDER

It sends the list of steps, then reads the number of a step from its input, runs it, says that it has, and so on. After
an error that the device does not survive, such as an illegal memory access, it ends, and another worker goes on.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

from .step import Here, Step

LAST_SECONDS = 10.0  # after which a worker ends whose overseer has not ended it
LOST = 3  # exit code of a worker whose device has failed


def main() -> None:
    _, module, deadline, pipe, folder = sys.argv[1:]
    warnings.filterwarnings("ignore", category=FutureWarning)
    ending = threading.Timer(float(deadline) - time.monotonic() + LAST_SECONDS, os._exit, (1,))
    ending.daemon = True
    ending.start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = Here(device, float(deadline), Path(folder), int(pipe))
    try:
        steps: list[Step] = importlib.import_module(module, __package__).steps(here)
    except ImportError as error:
        here.skip("all of it", f"it needs {error.name or 'a module'}, which is not installed ({error})")
        steps = []
    here.send("steps", value=[(step.name, step.seconds) for step in steps])
    for line in sys.stdin:
        number = int(line)
        if not _run(steps[number], here):
            here.send("lost", value=number)
            os._exit(LOST)
        here.send("done", value=number)


def _run(step: Step, here: Here) -> bool:
    """Runs a step and reports how it failed; whether the device is still usable."""
    here.step = step.name
    print(f"==== {step.name}", flush=True)
    try:
        step.run(here)
    except ImportError as error:
        here.skip(step.name, f"it needs {error.name or 'a module'}, which is not installed ({error})")
    except Exception as error:
        here.fail(error)
    if not here.on_gpu:
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        here.fail(error, ["the device does not answer any more; another process goes on with the next step"])
        return False
    return True


if __name__ == "__main__":
    main()
