"""Failures: one rank says why the run ends, once, and every rank ends."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
import torch.distributed as dist

from ..ranks import peers

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recv returned", "Timed out")
REMEDIES = {
    errno.ENOSPC: "free space or check run.dir",
    errno.EDQUOT: "free space, or have the quota of its file system raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable, or name another run.dir"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "put the folder back, or name another run.dir"),
}
GRACE_SECONDS = 3.0  # in which the launcher ends the ranks that have nothing to say
STEP_SECONDS = 20.0  # in which a step may come to its end after SIGTERM; launchers kill after 30
AGAIN = 75  # EX_TEMPFAIL: the exit status of a run that a signal has ended, and that goes on when it is started again
ASKS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 1.0  # in which a launcher may pass a terminal's Ctrl-C on to ranks that have heard it themselves


class RunFailed(RuntimeError):
    """A run that cannot go on, or has not kept what it should, for a reason that its message says whole.

    resumable: the same command goes on from the newest checkpoint.
    """

    resumable = True


class RunLost(RunFailed):
    """The run's folder is no longer its own."""

    resumable = False


class NotFinite(RunFailed, ArithmeticError):
    """Numbers of the training are not finite, or far too high, and with the same settings would not be again."""

    resumable = False

    @classmethod
    def loss(cls, value: float, step: int) -> NotFinite:
        """The loss of a step is not."""
        return cls(
            f"the loss must be finite; got {value} at step {step}. Lower optimizer.learning_rate, or set trainer.clip"
        )

    @classmethod
    def after(cls, reason: str, loss: float, first: int, last: int, rollbacks: int) -> NotFinite:
        """Several steps in a row were skipped, the last of them for this reason, and the run does not go back."""
        steps = f"{last - first + 1} step(s) in a row, {first} to {last}"
        if not math.isfinite(loss):
            what = f"the loss must be finite; got {loss} at step {last}, after {steps}, that were skipped"
        elif reason.startswith("the gradient"):
            what = f"the gradient must be finite; got {steps}, where it was not"
        else:
            what = f"the loss must come back below its limit (trainer.spike_deviations); got {steps}: {reason}"
        back = f" after {rollbacks} rollback(s) (trainer.max_rollbacks)" if rollbacks else ""
        return cls(
            f"{what}, and the weights stay as they are{back}. Lower optimizer.learning_rate, or set trainer.clip, and "
            f"start in another run.dir: anew, or from a checkpoint well before step {first} (checkpoint.resume=PATH)"
        )


class Stopped(BaseException):
    """SIGTERM arrived where no step ends soon: another rank has failed, or the job is cancelled."""


class _State:
    asked = 0  # the signal that asked for the run's end
    stepping = False  # whether someone looks at `asked` soon
    ending = False  # whether the run is being ended already
    interrupted: float | None = None  # when Ctrl-C was heard first


def catch_termination() -> None:
    """Lets SIGTERM, SIGUSR1 and Ctrl-C end a run gently: see `asked`.

    Where no step is under way, and where one takes too long, SIGTERM raises `Stopped`, so that files and W&B are
    closed. Where none is under way Ctrl-C raises KeyboardInterrupt, and a second one ends the process at once.
    """
    _State.asked, _State.stepping, _State.ending, _State.interrupted = 0, False, False, None

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and _interrupt():
            return
        _State.asked = max(_State.asked, number)
        if _State.ending:
            return
        if number == signal.SIGTERM:
            if not _State.stepping:
                raise Stopped
            if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
                signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)

    def stop(number: int, frame: FrameType | None) -> None:
        if not _State.ending:
            raise Stopped

    for number in ASKS:
        signal.signal(number, ask)
    signal.signal(signal.SIGALRM, stop)


def _interrupt() -> bool:
    """Whether this Ctrl-C is only an echo of the first. Ends the process at a second one."""
    now, before = time.monotonic(), _State.interrupted
    if before is None:
        if not (_State.stepping or _State.ending):
            raise KeyboardInterrupt
        _State.interrupted = now
        _say_now("Ctrl-C: saving after this step, then ending. Once more ends it at once, without saving")
        return False
    if now - before > ECHO_SECONDS:
        _say_now("ended at once, as a second Ctrl-C asks")
        os._exit(128 + signal.SIGINT)
    return True


def _say_now(text: str) -> None:
    """From the first rank, in a signal's handler: what was being printed when it came is not to be mixed up."""
    if int(os.environ.get("RANK", "0")) == 0:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def asked() -> int:
    """The signal that has asked this rank to save and end: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), or 0 for none."""
    return _State.asked


@contextmanager
def stepping() -> Iterator[None]:
    """While steps are taken, after each of which `asked` is looked at."""
    _State.stepping = True
    try:
        yield
    finally:
        _State.stepping = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def take_time() -> None:
    """Lets no signal cut short what comes now: it ends the run."""
    _State.ending = True


def report(
    error: BaseException, *, started: bool, hint: str = "", keep: Callable[[str], None] = lambda kind: None
) -> None:
    """Prints the reason if this is the first rank to fail, on the error output and in one write.

    started: whether training had begun. A ValueError before that is about settings and is shown without a traceback.
    hint: how to go on. keep: called by the rank that prints, with the error's kind, if that may be due to its rows.
    """
    if getattr(error, "reported", False):
        return
    error.reported = True  # type: ignore[attr-defined]
    take_time()  # the launcher's SIGTERM has nothing to add
    if not _first():
        time.sleep(GRACE_SECONDS)
        return
    others = peers.joined()
    lost = others.lost() if others is not None and is_consequence(error) else []
    with suppress(OSError):  # where errors go to a disk that is full
        print(message(error, started=started, hint=hint, lost=lost), file=sys.stderr, flush=True)
    if isinstance(error, NotFinite) or not isinstance(error, RunFailed | KeyboardInterrupt | Stopped) or lost:
        keep("a lost rank" if is_consequence(error) else type(error).__name__)
    if others is not None:
        time.sleep(peers.NOTICE_SECONDS)


def message(error: BaseException, *, started: bool, hint: str = "", lost: list[int] | None = None) -> str:
    """What is printed. lost: the ranks that were killed or do not answer, to which the error is due."""
    rank = int(os.environ.get("RANK", "0"))
    where = "".join(f"{note}: " for note in reversed(getattr(error, "__notes__", ())))
    if lost:
        text = f"{_named(lost)} killed or stopped answering; the others end too"
        if not isinstance(error, Stopped):
            text += f"\n(rank {rank} has lost another rank: {_noticed(error)})"
    elif isinstance(error, KeyboardInterrupt | Stopped):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by SIGTERM"
    elif isinstance(error, ValueError) and not started:
        return f"error: {where}{error}"
    elif isinstance(error, RunFailed):
        text = f"error: {error}"
    elif is_consequence(error):
        text = (
            f"rank {rank} has lost another rank, which was killed or stopped answering; this rank ends too\n"
            f"({_noticed(error)})"
        )
    else:
        lines = "".join(traceback.format_exception(error)).rstrip()
        text = f"{lines}\nrank {rank} failed: {where}{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            text += (
                "\nRaise parallel.sequence or engine.zero_stage, set trainer.activation_checkpointing=full, or lower "
                "data.rows_per_micro_batch"
            )
    return f"{text}\n{hint}" if hint else text


def is_consequence(error: BaseException) -> bool:
    """Whether another rank may be the cause: a connection that broke, or the launcher's SIGTERM."""
    if isinstance(error, RunFailed):
        return False
    return isinstance(error, Stopped) or any(sign in str(error) for sign in LOST_PEER)


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} was" if len(ranks) == 1 else f"ranks {names} were"


def _noticed(error: BaseException) -> str:
    return "; ".join([str(error).splitlines()[0], *getattr(error, "__notes__", ())])


def remedy(error: object) -> str:
    """What to do about a file that cannot be written, by the number in the system's message."""
    number = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(error))
    return REMEDIES.get(int(number[1] or number[2]), "check run.dir") if number else "check run.dir"


def _first() -> bool:
    if not dist.is_initialized():
        # Before the ranks have met, most errors are those of all: the first rank speaks, and another one only if the
        # launcher has not asked it to end by then.
        if int(os.environ.get("RANK", "0")):
            time.sleep(GRACE_SECONDS)
        return _State.asked != signal.SIGTERM
    if dist.get_world_size() == 1:
        return True
    if (others := peers.joined()) is not None:
        return others.first()
    # A counter in the store that the ranks met at: it outlives a rank, and asking it needs no other rank.
    try:
        return dist.distributed_c10d._get_default_store().add("longreach/failures", 1) == 1
    except RuntimeError:  # its host is gone: nobody else can tell
        return True
