"""A part of gpu_check whose steps fail in every way in which a step can."""

from __future__ import annotations

import os
import signal
import time

from longreach.launch.gpu.step import Here, Step


def steps(here: Here) -> list[Step]:
    here.send("expected", value=["a/x"])
    names = (good, wrong, dies, loses_the_device, hangs, lacks, off, never_ends)
    return [Step(step.__name__, step, 1.0 if step is hangs else None) for step in names]


def good(here: Here) -> None:
    here.row("Table", op="a|b", error=0.00123456, tokens=131072)


def wrong(here: Here) -> None:
    raise ValueError("q must be right; got [1, 2]\nand more")


def dies(here: Here) -> None:
    here.row("Table", op="before the end")
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def loses_the_device(here: Here) -> None:
    """As a worker ends whose step the device has not survived."""
    here.fail("illegal memory access")
    here.send("lost", value=3)
    os._exit(3)


def hangs(here: Here) -> None:
    here.note("it hangs")
    time.sleep(600)


def lacks(here: Here) -> None:
    import no_such_package  # noqa: F401


def off(here: Here) -> None:
    here.fail("off by 3", ["q [1, 2]: error 3"])


def never_ends(here: Here) -> None:
    here.note("it never ends")
    time.sleep(600)
