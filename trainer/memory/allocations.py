"""Allocations: the bytes that tensors of one device hold, as operations make them and let go of them."""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Allocations(TorchDispatchMode):
    """Counts the storages that operations return within, each once; tensors without data, on `meta`, count alike.

    What an operation needs beside its results, and lets go of before it returns, is not seen.
    live, peak: bytes now, and at most.      live_by: bytes now by the label under which they were made.
    until: the time by `time.monotonic` from which operations raise TimeoutError.
    """

    def __init__(self, device: str, until: float = math.inf) -> None:
        super().__init__()
        self.until = until
        self.device = device
        self.live = self.peak = 0
        self.live_by: Counter[str] = Counter()
        self.label = ""
        self._known: dict[int, int] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made within has this label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def leave_out(self, tensors: Iterable[Tensor | None]) -> None:
        """These are no part of what is counted, nor are views of them; they outlive the counting."""
        self._known |= {id(x.untyped_storage()): 0 for x in tensors if x is not None}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if time.monotonic() > self.until:
            raise TimeoutError("counting has taken too long")
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, x: Tensor) -> None:
        if x.device.type != self.device:
            return
        storage = x.untyped_storage()  # one object as long as the memory lives
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known[id(storage)] = size
        weakref.finalize(storage, self._free, id(storage), self.label).atexit = False
        self.live += size
        self.live_by[self.label] += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, label: str) -> None:
        size = self._known.pop(key)
        self.live -= size
        self.live_by[label] -= size


def size(number: float) -> str:
    """Bytes as people read them."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if abs(number) < 1024:
            return f"{number:,.{digits}f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"
