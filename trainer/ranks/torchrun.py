"""python -m longreach.trainer.ranks.torchrun ARGUMENTS — torchrun, with the status of runs that a signal has ended.

torchrun itself ends with 1 whatever its ranks say, and a signal that it gets leaves them 30 seconds. Here SIGTERM and
Ctrl-C are passed on to the ranks, which save and end in their own time; a second one is torchrun's again. Where all
ranks of this machine leave with AGAIN (see `trainer.run.failure`), so does this.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.run import parse_args, run

from ..run.failure import AGAIN, ECHO_SECONDS

PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def pass_signals_on() -> None:
    """To the ranks, which are this process's children."""
    heard: dict[int, float] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        before, heard[number] = heard.get(number), time.monotonic()
        ranks = psutil.Process().children()
        if not ranks or (before is not None and heard[number] - before > ECHO_SECONDS):
            raise SignalException(f"torchrun got {signal.Signals(number).name}", sigval=signal.Signals(number))
        for rank in ranks:
            rank.send_signal(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)


@record
def main() -> None:
    arguments = parse_args(sys.argv[1:])
    if hasattr(arguments, "signals_to_handle"):  # a version without it keeps its own handlers
        arguments.signals_to_handle = "SIGHUP,SIGQUIT"
        pass_signals_on()
    try:
        run(arguments)
    except ChildFailedError as error:
        codes = {failed.exitcode for failed in error.failures.values()}
        # A rank that leaves with 1 has said why, and torchrun has ended the others.
        said = 1 in codes and codes <= {1, -signal.SIGTERM}
        if not said and codes != {AGAIN}:
            raise
        sys.exit(1 if said else AGAIN)


if __name__ == "__main__":
    main()
