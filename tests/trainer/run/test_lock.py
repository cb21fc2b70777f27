"""The lock of a run's folder: refused while its holder lives, taken over when that is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longreach.trainer.run import lock as run_lock
from longreach.trainer.run.lock import Holder, RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from longreach.trainer.run.lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); assert lock.attempt(); print('held', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def left(folder: Path, **changes: object) -> Path:
    """A lock that somebody else has left."""
    path = folder / "lock.json"
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), token="theirs", **changes))))  # type: ignore[arg-type]
    return path


@pytest.mark.slow
def test_a_living_run_is_named_and_a_killed_one_taken_over(tmp_path: Path, holder) -> None:
    with pytest.raises(ValueError, match=f"run.dir must be of one run at a time; .* process {holder.pid} on .*another"):
        RunLock(tmp_path).attempt()
    os.kill(holder.pid, signal.SIGSTOP)  # it may go on
    with pytest.raises(ValueError, match=f"process {holder.pid}"):
        RunLock(tmp_path).attempt()
    holder.kill()
    while run_lock._state(holder.pid)[0] != "Z":  # not yet waited for, and dead
        time.sleep(0.01)
    lock = RunLock(tmp_path)
    assert lock.attempt()
    assert lock.lost() is None
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_was_used_again_is_not_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    left(tmp_path, pid=os.getppid(), started="1")
    lock = RunLock(tmp_path)
    assert lock.attempt()
    lock.release()
    left(tmp_path, pid=os.getppid(), started=run_lock._state(os.getppid())[1])  # type: ignore[index]
    with pytest.raises(ValueError, match="one run at a time"):
        RunLock(tmp_path).attempt()


def test_a_run_of_another_machine_lives_while_its_lock_is_renewed(tmp_path: Path) -> None:
    path = left(tmp_path, host="far", machine="far away", pid=7)
    lock = RunLock(tmp_path)
    assert not lock.attempt()
    assert not lock.attempt()
    os.utime(path, (time.time() + 1, time.time() + 1))
    with pytest.raises(ValueError, match="process 7 on far trains"):
        lock.attempt()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """This process's own clock, which the test sets."""
    now = [1000.0]
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    return now


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_run_of_another_machine_that_is_silent_is_dead(
    tmp_path: Path, clock: list[float], content: str | None
) -> None:
    path = left(tmp_path, host="far", machine="far away")
    if content is not None:  # it was killed while it wrote the lock
        path.write_text(content)
    long_ago = time.time() - run_lock.SILENT_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    lock = RunLock(tmp_path)
    assert not lock.attempt()
    clock[0] += run_lock.WATCHED_SECONDS - 1
    assert not lock.attempt()
    clock[0] += 1
    assert lock.attempt()
    assert lock.lost() is None
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]
    lock.release()


def test_a_clock_that_jumps_forward_does_not_make_a_living_run_a_dead_one(tmp_path: Path, clock: list[float]) -> None:
    path = left(tmp_path, host="far", machine="far away", pid=7)
    lock, jump = RunLock(tmp_path), time.time() - 10 * run_lock.SILENT_SECONDS
    os.utime(path, (jump, jump))  # its last sign of life is hours old by the file system's clock, and seconds old
    assert not lock.attempt()
    clock[0] += run_lock.HEARTBEAT_SECONDS
    os.utime(path)
    with pytest.raises(ValueError, match="process 7 on far trains"):
        lock.attempt()


@pytest.mark.parametrize("jump", [-7200, -0.5])
def test_a_clock_that_jumps_back_hides_neither_a_living_run_nor_a_dead_one(
    tmp_path: Path, clock: list[float], jump: float
) -> None:
    path = left(tmp_path, host="far", machine="far away", pid=7)
    before = time.time() + 3600  # written by a clock that was ahead
    os.utime(path, (before, before))
    dead = RunLock(tmp_path)
    assert not dead.attempt()
    clock[0] += run_lock.SILENT_SECONDS
    assert dead.attempt()
    dead.release()
    left(tmp_path, host="far", machine="far away", pid=7)
    os.utime(path, (before, before))
    living = RunLock(tmp_path)
    assert not living.attempt()
    os.utime(path, (before + jump, before + jump))
    with pytest.raises(ValueError, match="process 7 on far trains"):
        living.attempt()


def test_of_many_that_take_over_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    left(tmp_path, pid=2**22 + 1)  # more than there can be
    locks = [RunLock(tmp_path) for _ in range(8)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda lock=lock: got.append(lock.attempt())) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got)[-1]
    assert [lock.lost() is None for lock in locks].count(True) == 1


def test_the_lock_is_renewed_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    assert lock.attempt()
    os.utime(lock.path, (1, 1))
    deadline = time.monotonic() + 5
    while lock.path.stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    del lock  # a trainer that never ran
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_has_gone_is_lost_and_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    assert lock.attempt()
    folder.rename(tmp_path / "elsewhere")
    assert "was moved, removed or emptied" in str(lock.lost())
    folder.write_text("a file in its place")
    assert "was moved, removed or emptied" in str(lock.lost())
    lock.release()
    (tmp_path / "elsewhere").rename(tmp_path / "again")
    folder.unlink()
    (tmp_path / "again").rename(folder)
    left(folder, pid=12, host="here")
    assert "was taken over by process 12 on here" in str(lock.lost())
    lock.release()
    assert (folder / "lock.json").exists()
