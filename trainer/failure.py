"""Failures: one rank says why the run ends, once, and every rank ends."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from types import FrameType

import torch
import torch.distributed as dist

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recv returned", "Timed out")
GRACE_SECONDS = 3.0  # in which the launcher ends the ranks that have nothing to say


class Stopped(BaseException):
    """SIGTERM arrived: the launcher ends this rank because another one failed, or the job is cancelled."""


def catch_termination() -> None:
    """Turns SIGTERM into `Stopped`, so that files and W&B are closed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)


def report(error: BaseException, *, started: bool, hint: str = "") -> None:
    """Prints the reason if this is the first rank to fail, on the error output and in one write.

    started: whether training had begun. A ValueError before that is about settings and is shown without a traceback.
    hint: how to go on.
    """
    if getattr(error, "reported", False):
        return
    error.reported = True  # type: ignore[attr-defined]
    if not _first():
        time.sleep(GRACE_SECONDS)
        return
    print(message(error, started=started, hint=hint), file=sys.stderr, flush=True)


def message(error: BaseException, *, started: bool, hint: str = "") -> str:
    """What is printed."""
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, KeyboardInterrupt | Stopped):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by SIGTERM"
    elif isinstance(error, ValueError) and not started:
        return f"error: {error}"
    elif any(sign in str(error) for sign in LOST_PEER):
        where = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        text = (
            f"rank {rank} has lost another rank, which was killed or stopped answering; this rank ends too\n"
            f"({str(error).splitlines()[0]}{where})"
        )
    else:
        lines = "".join(traceback.format_exception(error)).rstrip()
        where = "".join(f"{note}: " for note in reversed(getattr(error, "__notes__", ())))
        text = f"{lines}\nrank {rank} failed: {where}{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            text += (
                "\nRaise parallel.sequence or engine.zero_stage, set trainer.activation_checkpointing=full, or lower "
                "data.rows_per_micro_batch"
            )
    return f"{text}\n{hint}" if hint else text


def _first() -> bool:
    if not dist.is_initialized():
        # Before the ranks have met, most errors are those of all: the first rank speaks, and another one only if the
        # launcher has not ended it by then.
        if int(os.environ.get("RANK", "0")):
            time.sleep(GRACE_SECONDS)
        return True
    if dist.get_world_size() == 1:
        return True
    # A counter in the store that the ranks met at: it outlives a rank, and asking it needs no other rank.
    try:
        return dist.distributed_c10d._get_default_store().add("longreach/failures", 1) == 1
    except RuntimeError:  # its host is gone: nobody else can tell
        return True
