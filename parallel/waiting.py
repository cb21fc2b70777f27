"""Waiting: for how long what a rank computes stands still until others' tensors are there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """Adds up the waits of one rank within `counting`.

    On a CPU a wait is the time in which the thread is blocked. On a GPU, where the host waits for nothing, it is the
    time between two events around it on the stream that computes: what other work of that stream covers is no wait.
    """

    def __init__(self) -> None:
        self._seconds, self._counts = 0.0, False
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._unused: list[torch.cuda.Event] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Waits within count."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """What is within is a wait of what runs on this device."""
        if not self._counts:
            yield
        elif device.type == "cuda":
            first, last = self._event(), self._event()
            first.record()
            yield
            last.record()
            self._pairs.append((first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Seconds of the waits that have ended since the last call. The host does not wait: others come next time."""
        while self._pairs and self._pairs[0][1].query():
            pair = self._pairs.popleft()
            self._seconds += pair[0].elapsed_time(pair[1]) / 1000
            self._unused += pair
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _event(self) -> torch.cuda.Event:
        return self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
