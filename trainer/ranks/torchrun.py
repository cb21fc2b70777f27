"""python -m longreach.trainer.ranks.torchrun ARGUMENTS — torchrun, with the status of runs that a signal has ended.

torchrun itself ends with 1 whatever its ranks say, and a signal that it gets leaves them 30 seconds. Here SIGTERM and
Ctrl-C are passed on to the ranks, which save and end in their own time; a second one is torchrun's again. Where all
ranks of this machine leave with AGAIN (see `trainer.run.failure`), so does this: they are not started again, whatever
`--max-restarts` says, which is for ranks that fail.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from types import FrameType
from typing import Any, cast

import psutil
from torch.distributed.elastic.agent.server import WorkerGroup
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from ..run.failure import AGAIN, ECHO_SECONDS

PASSED_ON = (signal.SIGTERM, signal.SIGINT)


class Agent(LocalElasticAgent):
    """torchrun's agent, which does not start ranks again that were told to end."""

    _ended: RunResult | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = cast(RunResult, cast(Any, super())._monitor_workers(worker_group))
        self._ended = ended
        return ended

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        failures = self._ended.failures if self._ended is not None else {}
        if failures and all(failed.exitcode == AGAIN for failed in failures.values()):
            raise ChildFailedError(worker_group.spec.get_entrypoint_name(), failures)
        cast(Any, super())._restart_workers(worker_group)


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


def says_more_than_ranks(line: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log tells what no rank has: not that it ends them, nor that one left with a reason.

    A rank that leaves with 1 or AGAIN has said why. What was killed has not, and stays in the log.
    """
    text = line.getMessage()
    left = re.match(r"failed \(exitcode: (-?\d+)\)", text)
    return not re.match(r"Sending process \d+ closing signal SIGTERM", text) and not (
        left and int(left[1]) in (1, AGAIN)
    )


@record
def main() -> None:
    arguments = parse_args(sys.argv[1:])
    logging.getLogger(processes.__name__).addFilter(says_more_than_ranks)
    if hasattr(arguments, "signals_to_handle"):  # a version without it keeps its own handlers
        arguments.signals_to_handle = "SIGHUP,SIGQUIT"
        pass_signals_on()
    api.LocalElasticAgent = Agent  # type: ignore[misc]  # torch has no other way to give one
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
