"""One rank says why, once; what it says depends on who is to blame."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr

import pytest
import torch
from distributed import run_ranks

from longreach.parallel.mesh import Mesh
from longreach.trainer.ranks import exchange as exchange_module
from longreach.trainer.ranks.exchange import from_first_rank, gather_numbers, prepare, together
from longreach.trainer.run import failure


def fail(rank: int, world: int) -> str:
    failure.GRACE_SECONDS = 0.0
    printed = io.StringIO()
    error = RuntimeError(f"rank {rank} is broken")
    with redirect_stderr(printed):
        failure.report(error, started=True, hint="try again")
        failure.report(error, started=True, hint="try again")
    return printed.getvalue()


@pytest.mark.slow
def test_one_rank_reports_and_once() -> None:
    printed = [text for text in run_ranks(3, fail) if text]
    assert len(printed) == 1
    assert printed[0].count("is broken") == 2  # the traceback's last line, and the summary
    assert printed[0].rstrip().endswith("try again")


@pytest.mark.parametrize(
    ("error", "started", "expected"),
    [
        (ValueError("trainer.steps must be 1"), False, "error: trainer.steps must be 1"),
        (KeyboardInterrupt(), True, "interrupted\nresume so"),
        (failure.Stopped(), True, "ended by SIGTERM\nresume so"),
        (RuntimeError("[..] Connection closed by peer [1.2.3.4]:5"), True, "has lost another rank"),
    ],
)
def test_what_is_said(error: BaseException, started: bool, expected: str) -> None:
    text = failure.message(error, started=started, hint="resume so")
    assert expected in text
    assert "Traceback" not in text


@pytest.mark.parametrize("error", [failure.Stopped(), RuntimeError("[..] Connection closed by peer [1.2.3.4]:5")])
def test_lost_ranks_are_named_whatever_their_peers_notice(error: BaseException) -> None:
    text = failure.message(error, started=True, hint="resume so", lost=[1, 3])
    assert text.startswith("ranks 1, 3 were killed or stopped answering")
    assert "SIGTERM" not in text
    assert text.endswith("resume so")


CASCADE = """
import os, signal, sys, time, torch.distributed as dist, torch
from longreach.trainer.ranks import processes
from longreach.trainer.run import failure
failure.catch_termination()
processes.start(1, "cpu")
rank, how, victim = int(os.environ["RANK"]), sys.argv[1], int(sys.argv[2])
dist.barrier()
try:
    with failure.stepping():
        if rank == victim:
            time.sleep(0.3)
            if how == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the real reason")
        if how == "KILL" and rank == 2:
            time.sleep(0.8)
            raise failure.Stopped  # the launcher's SIGTERM, in a rank that has noticed nothing
        dist.recv(torch.zeros(1), 1 - victim if rank == 2 else victim)  # rank 2 notices the end of who noticed
except BaseException as error:
    failure.report(error, started=True)
    processes.leave(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "victim", "expected"),
    [
        ("KILL", "1", "rank 1 was killed or stopped answering"),
        ("KILL", "0", "rank 0 was killed or stopped answering"),  # which holds the store that the others met at
        ("RAISE", "0", "rank 0 failed: ArithmeticError: the real reason"),
    ],
)
def test_of_several_ranks_that_fail_in_turn_the_first_is_shown_once(how: str, victim: str, expected: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(3):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", CASCADE, how, victim]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = "".join(process.communicate(timeout=90)[1] for process in ranks)
    told = re.findall(
        r"^.*(?:was killed or|were killed or|failed: |ended by|has lost another rank, ).*$", said, re.MULTILINE
    )
    assert len(told) == 1, said
    assert told[0].startswith(expected)
    assert all(process.returncode for process in ranks)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The signals' handlers of a run, and what a second Ctrl-C did in place of ending the process."""
    ended: list[str] = []
    before = {number: signal.getsignal(number) for number in (*failure.ASKS, signal.SIGALRM)}
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(f"left with {status}"))
    monkeypatch.setattr(failure, "_say_now", ended.append)
    failure.catch_termination()
    yield ended
    for number, handler in before.items():
        signal.signal(number, handler)
    failure._State.asked = 0


@pytest.mark.parametrize("number", failure.ASKS)
def test_a_signal_in_a_step_asks_for_the_end_after_it(heard: list[str], number: int) -> None:
    with failure.stepping():
        signal.raise_signal(number)
        assert failure.asked() == number
    assert "left with 130" not in heard


def test_ctrl_c_twice_ends_at_once_unless_the_launcher_repeats_it(
    heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with failure.stepping():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert heard == ["Ctrl-C: saving after this step, then ending. Once more ends it at once, without saving"]
        failure.take_time()  # the checkpoint is being written
        monkeypatch.setattr(failure, "ECHO_SECONDS", -1.0)
        signal.raise_signal(signal.SIGINT)
    assert heard[-1] == "left with 130"


def test_before_the_first_step_signals_end_a_run_at_once(heard: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(failure.Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_bug_keeps_its_traceback_and_lack_of_memory_its_remedies() -> None:
    try:
        raise torch.OutOfMemoryError("no memory")
    except torch.OutOfMemoryError as error:
        text = failure.message(error, started=True)
    assert "Traceback" in text
    assert "data.rows_per_micro_batch" in text


def exchange(rank: int, world: int) -> tuple[list[list[float]], str, str]:
    mesh = Mesh.create(world)

    def check() -> None:
        if rank == 1:
            raise ValueError("only rank 1 sees this")

    with pytest.raises(ValueError, match="only rank 1") as error:
        together(mesh, check)
    return gather_numbers([rank, 2.5], mesh).tolist(), from_first_rank(f"from {rank}", mesh), str(error.value)


@pytest.mark.slow
def test_values_and_errors_are_shared() -> None:
    for numbers, chosen, error in run_ranks(3, exchange):
        assert numbers == [[0.0, 2.5], [1.0, 2.5], [2.0, 2.5]]
        assert chosen == "from 0"
        assert error == "only rank 1 sees this"


def prepare_apart(rank: int, world: int) -> tuple[int, list[str]]:
    exchange_module.BEAT_S, exchange_module.SILENT_S, exchange_module.POLLS_S = 0.05, 0.4, (0.02, 0.05)
    mesh = Mesh.create(world)

    def slow() -> int:
        time.sleep(0.8 if rank == 1 else 0.0)  # longer than silence is allowed to last
        return rank

    result, errors = prepare(mesh, slow), []
    for error in (ValueError("data.path must be there"), OSError("no room")):

        def fail(error: Exception = error) -> None:
            if rank == 1:
                time.sleep(0.2)
                raise error

        with pytest.raises(Exception) as raised:  # noqa: PT011
            prepare(mesh, fail)
        errors.append(f"{type(raised.value).__name__}: {raised.value}")
    return result, errors


@pytest.mark.slow
def test_ranks_that_prepare_at_different_speeds_wait_and_fail_together() -> None:
    first, second = run_ranks(2, prepare_apart)
    assert first == (0, ["ValueError: data.path must be there", "RuntimeError: rank 1 failed: no room"])
    assert second == (1, ["ValueError: data.path must be there", "OSError: no room"])


def prepare_beside_a_silent_rank(rank: int, world: int) -> str:
    exchange_module.SILENT_S = 0.3
    mesh = Mesh.create(world)
    if rank == 1:
        next(exchange_module._preparations)  # it never comes to this one
        time.sleep(1.0)
        return ""
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 1") as raised:
        prepare(mesh, lambda: None)
    return failure.message(raised.value, started=False)


@pytest.mark.slow
def test_a_rank_that_gives_no_sign_of_life_is_lost() -> None:
    assert run_ranks(2, prepare_beside_a_silent_rank)[0].startswith("rank 0 has lost another rank")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("[Errno 28] No space left on device (rank 3)", "free space"),
        ("No space left on device (os error 28)", "free space"),
        ("[Errno 122] Disk quota exceeded", "quota"),
        ("[Errno 30] Read-only file system: 'x'", "make it writable"),
        ("[Errno 2] No such file or directory: 'x'", "put the folder back"),
        ("something else", "check run.dir"),
    ],
)
def test_the_advice_fits_what_the_system_said(error: str, expected: str) -> None:
    assert expected in failure.remedy(error)


def test_a_run_that_failed_for_a_known_reason_is_told_without_a_traceback() -> None:
    error = failure.RunLost("run.dir must stay")
    said = failure.message(error, started=True, hint="this was in step 3")
    assert said == "error: run.dir must stay\nthis was in step 3"
