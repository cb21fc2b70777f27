"""Peers: which rank was lost first, and that one rank alone says so.

A rank that is killed says nothing, and what its peers notice (a closed connection, the launcher's SIGTERM) names
nobody. So each rank has a thread that waits in the store that the ranks met at. The first rank that is about to end
calls them all, and those whose thread does not answer are the lost ones, however late their peers notice.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ANSWER_SECONDS = 2.0  # what a rank gets to answer; its thread needs the interpreter for a moment
NOTICE_SECONDS = 1.5  # what the launcher gets to notice a lost rank before one that ends because of it
END_SECONDS = 90.0  # what a rank gets to end once another one has called; then it hangs, in a collective
FOREVER = timedelta(days=3650)


class Peers:
    """The other ranks of the default process group, by connections of their own to its store.

    Joined by every rank, after `init_process_group`; MASTER_ADDR and MASTER_PORT lead to the store.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._waiting, self._store = _connect(), _connect()
        self._called, self._gone, self._over = threading.Event(), threading.Event(), threading.Event()
        # Distinguishes this run's marker file from those of other runs on this machine.
        identity = self._store.compare_set("run", "", uuid.uuid4().hex).decode()
        self._said = Path(tempfile.gettempdir()) / f"longreach-said-{identity}"
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def first(self) -> bool:
        """Whether no other rank has asked before: the one that may say why the run ends. It calls all others."""
        if self._gone.is_set():
            return self._first_here()
        try:
            if self._store.add("failures", 1) > 1:
                return False
            for rank in range(self.world):
                self._store.set(f"call/{rank}", "")
            return True
        except RuntimeError:  # the store has gone; if this rank was called before, one that said why has closed it
            return not self._called.is_set() and self._first_here()

    def lost(self) -> list[int]:
        """After `first`: the ranks that have not answered in time, which were killed or hang."""
        answers = [f"here/{rank}" for rank in range(self.world)]
        try:
            deadline = time.monotonic() + ANSWER_SECONDS
            while not self._gone.is_set() and not self._store.check(answers) and time.monotonic() < deadline:
                time.sleep(0.02)
            if not self._gone.is_set():
                return [rank for rank, answer in enumerate(answers) if not self._store.check([answer])]
        except RuntimeError:
            pass
        return [] if _launcher_hosts() else [0]

    def leave(self) -> None:
        """Ends the thread, at the end of a run that went well."""
        self._over.set()
        try:
            self._store.set(f"call/{self.rank}", "")
        except RuntimeError:
            return  # the rank that held the store has ended already

    def _first_here(self) -> bool:
        try:
            os.close(os.open(self._said, os.O_CREAT | os.O_EXCL))
            return True
        except OSError:
            return False

    def _watch(self) -> None:
        try:
            self._waiting.wait([f"call/{self.rank}"], FOREVER)
            self._called.set()
            if not self._over.is_set():
                self._waiting.set(f"here/{self.rank}", "")
        except RuntimeError:  # the rank that held the store was lost
            self._gone.set()
        if not self._over.wait(END_SECONDS):
            os._exit(1)


def join() -> None:
    """Watches the other ranks of the default process group, if there are any and they met by MASTER_ADDR."""
    global _peers
    if dist.get_world_size() > 1:
        _peers = Peers(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends watching."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None


def joined() -> Peers | None:
    """The other ranks, where they are watched."""
    return _peers


_peers: Peers | None = None


def _launcher_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect() -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"longreach/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
