"""Lock of a run's folder: one run at a time trains in it, and the lock of a dead one is taken over."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "lock.json"
HEARTBEAT_SECONDS = 15.0  # between signs of life
SILENT_SECONDS = 180.0  # without one, a run of another machine is dead
WATCHED_SECONDS = 45.0  # of silence that this process has to have seen itself, since clocks jump
POLL_SECONDS = 2.0  # between looks at a lock of which it is not known yet whether its run lives
SETTLE_SECONDS = 0.5  # in which another run that takes over the same dead lock shows

log = logging.getLogger("longreach")


@dataclass(frozen=True)
class Holder:
    """A process that has or had the lock.

    machine: identifies the space of process numbers: the host's name, its boot, and the namespace of processes.
    started: when the process did, in the machine's own count, since numbers are used again.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        """This process."""
        host, pid = socket.gethostname(), os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(host, _machine(host), pid, (_state(pid) or ("", ""))[1], since, uuid.uuid4().hex)

    @property
    def alive(self) -> bool:
        """Whether the process runs; to be asked on its own machine."""
        if Path("/proc/self/stat").exists():
            state = _state(self.pid)
            return state is not None and state[0] not in "ZX" and self.started in ("", state[1])
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def _machine(host: str) -> str:
    parts = [host]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _state(pid: int) -> tuple[str, str] | None:
    """A process's state, as one letter, and when it started; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> Holder | None:
    """Whose lock it is; None if the file does not say. Raises OSError, FileNotFoundError where there is no lock."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


class RunLock:
    """`lock.json` in a run's folder, held by the run's first rank from its start to its end, however that comes.

    On its own machine the holder is dead when its process is. On another one it is when its lock, whose time it renews
    every HEARTBEAT_SECONDS, has not changed for SILENT_SECONDS: by the file system's clock, and for WATCHED_SECONDS of
    them by this process's own, which no one sets; or by its own alone, whatever the file system's says.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._mine = Holder.this_process()
        self._seen: tuple[str, float] | None = None  # token and time of the lock
        self._since = 0.0  # when they were seen first, by the clock that nobody sets
        self._release: weakref.finalize | None = None

    def attempt(self) -> bool:
        """Whether the lock is held now; if not, ask again after POLL_SECONDS.

        Raises ValueError if another run holds it, and OSError where it cannot be written.
        """
        try:
            self.path.open("x").close()
            self._write(self.path)
        except FileExistsError:
            try:
                if not self._may_take_over():
                    return False
            except FileNotFoundError:  # it was released just now
                return False
            self._replace()
            if self.lost() is not None:
                return False
        stop = threading.Event()
        threading.Thread(target=_beat, args=(self.path, self._mine.token, stop), daemon=True).start()
        # Also where a trainer was made and never run.
        self._release = weakref.finalize(self, _let_go, self.path, self._mine, stop)
        return True

    def lost(self) -> str | None:
        """Why the folder is no longer this run's, and what to do; None while it is, and while the disk is silent."""
        return _lost(self.path, self._mine.token)

    def release(self) -> None:
        """Removes the lock if it is this run's."""
        if self._release is not None:
            self._release()

    def _write(self, path: Path) -> None:
        try:
            path.write_text(json.dumps(asdict(self._mine), indent=1) + "\n", encoding="utf-8")
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _replace(self) -> None:
        aside = self.path.with_name(f".{NAME}.{self._mine.token}")
        self._write(aside)
        os.replace(aside, self.path)
        time.sleep(SETTLE_SECONDS)

    def _may_take_over(self) -> bool:
        holder, changed = _read(self.path), self.path.stat().st_mtime
        if holder is not None and holder.machine == self._mine.machine:
            if holder.pid != self._mine.pid and holder.alive:
                raise self._refusal(holder)
            log.info("%s was left by process %d, which has ended, and is taken over", self.path, holder.pid)
            return True
        seen = "" if holder is None else holder.token, changed
        before, now = self._seen, time.monotonic()
        if before is not None and holder is not None and before[0] == seen[0] and before != seen:
            raise self._refusal(holder)  # a sign of life, whichever way its clock goes
        if before != seen:
            self._seen, self._since = seen, now
        name = "a run" if holder is None else f"process {holder.pid} on {holder.host}"
        silent, watched = self._now() - changed, now - self._since
        if watched >= SILENT_SECONDS or (silent > SILENT_SECONDS and watched >= WATCHED_SECONDS):
            log.info(
                "%s is of %s, which has not been heard of for %.0f s; it is taken over",
                *(self.path, name, max(silent, watched)),
            )
            return True
        if before is None:
            log.info(
                "%s is of %s, last heard of %.0f s ago; looking for up to %.0f s whether that still runs",
                *(self.path, name, silent, min(max(SILENT_SECONDS - silent, WATCHED_SECONDS), SILENT_SECONDS)),
            )
        return False

    def _now(self) -> float:
        """By the clock of the file system, which need not be this machine's."""
        probe = self.path.with_name(f".{NAME}.{self._mine.token}")
        probe.write_text("")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: Holder) -> ValueError:
        return ValueError(
            f"run.dir must be of one run at a time; got {self.path.parent}, in which process {holder.pid} on "
            f"{holder.host} trains since {holder.since}. Wait for that run or end it, or give this one another run.dir"
        )


def _lost(path: Path, token: str) -> str | None:
    try:
        holder = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return (
            f"{path.parent} was moved, removed or emptied ({path.name} is gone). Put it back and give the same command "
            "to go on from its newest checkpoint, or start anew"
        )
    except OSError:
        return None
    if holder is None or holder.token == token:
        return None
    return (
        f"{path.parent} was taken over by process {holder.pid} on {holder.host}. Let that one go on, or give this one "
        "another run.dir"
    )


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        if _lost(path, token) is None:
            with suppress(OSError):
                os.utime(path)


def _let_go(path: Path, mine: Holder, stop: threading.Event) -> None:
    if os.getpid() != mine.pid:  # a process that was forked from the holder
        return
    stop.set()
    with suppress(OSError):
        if _read(path) == mine:
            path.unlink()
