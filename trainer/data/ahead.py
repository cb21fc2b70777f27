"""Ahead: a thread makes what a loop needs next while the loop works on what it has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

END_SECONDS = 10.0  # what the thread gets to finish the item that it makes; then it ends with the process

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """The items of an iterator, each made by one thread while the loop uses the one before it.

    items: runs in the thread alone, from now on. While it makes item n the loop uses item n − 1, so that what it made
    up to item n − 2 is used by nobody else any more. device: the one that the thread works for.

    An error in the thread is raised where its item is asked for, and again for every later one. Leaving the context
    ends the thread.
    """

    def __init__(self, items: Iterator[Item], device: torch.device) -> None:
        self._items, self._device = items, device
        self._asked: SimpleQueue[bool] = SimpleQueue()  # True: one more item; False: the end
        self._made: SimpleQueue[tuple[Item] | BaseException] = SimpleQueue()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._asked.put(True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._end is not None:
            raise self._end
        self._asked.put(True)
        made = self._made.get()
        if isinstance(made, BaseException):
            self._end = made
            raise made
        return made[0]

    def __enter__(self) -> Ahead[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._end = self._end or RuntimeError("the thread that makes items has been ended")
        self._asked.put(False)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            while self._asked.get():
                self._made.put((next(self._items),))
        except BaseException as error:  # StopIteration too: the end of the items
            self._made.put(error)
