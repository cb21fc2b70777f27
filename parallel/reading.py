"""Reading: a few numbers that the host needs from the device, copied while the device goes on computing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class Reading:
    """A copy of a small tensor to the host, under way; on the CPU the tensor itself.

    `ready` says whether the values are there without waiting. What the device is given after a `Reading` began does not
    delay it.
    """

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = x
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """What the device gets inside waits for the copied tensor, and for nothing that the device was given later.

        `join` comes before a tensor that is made inside is used outside.
        """
        if self._event is None:
            yield
            return
        stream = _second_stream(device)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield

    def join(self, *made: Tensor) -> None:
        """What the device is given from now on waits for what it got inside `beside`, and may use these tensors."""
        if self._event is None:
            return
        for x in made:
            here = torch.cuda.current_stream(x.device)
            here.wait_stream(_second_stream(x.device))
            x.record_stream(here)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
