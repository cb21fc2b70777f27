"""Offloading: what blocks keep for backward goes to the host, and comes back one block ahead of its use.

torch's `save_on_cpu` copies on the stream that computes, which waits both ways, and brings nothing back ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Event: TypeAlias = torch.cuda.Event | torch._C.Event
LEAST_BYTES = 2**16  # smaller tensors stay


class Copies(Protocol):
    """How tensors travel between a device and the host."""

    def send(self, x: Tensor) -> Any:
        """Begins to copy to the host, and lets go of x: what stands for the copy."""
        ...

    def bring(self, sent: Any) -> Any:
        """Begins to bring a copy back: what stands for the tensor on its way."""
        ...

    def arrive(self, coming: Any) -> Tensor:
        """The tensor on its device; what is computed from here on waits for it, the host does not."""
        ...


class PinnedCopies:
    """Copies of CUDA tensors in pinned memory, on a stream of their own beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, x: Tensor) -> tuple[Tensor, Event]:
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not given away before it is copied
        return host, self.stream.record_event()

    def bring(self, sent: tuple[Tensor, Event]) -> tuple[Tensor, Event]:
        host, copied = sent
        self.stream.wait_event(copied)
        with torch.cuda.stream(self.stream):
            return host.to(self.device, non_blocking=True), self.stream.record_event()

    def arrive(self, coming: tuple[Tensor, Event]) -> Tensor:
        x, copied = coming
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        x.record_stream(current)
        return x


@cache
def copies_of(device: torch.device) -> Copies | None:
    """How tensors of this device travel; None for those that are on the host, or nowhere."""
    return PinnedCopies(device) if device.type == "cuda" else None


class _Parcel:
    """One tensor between pack and unpack."""

    def __init__(self, sent: Any) -> None:
        self.sent, self.coming = sent, None


class Journey:
    """What one block keeps, on its way to the host and back.

    before: the journey of the block before, whose tensors begin to come back when this block's are asked for. stays:
    what the block keeps is used next, as the last block's is, and stays on the device.
    """

    def __init__(self, copies: Copies, before: Journey | None, *, stays: bool = False) -> None:
        self.copies, self.before, self.stays = copies, before, stays
        self._parcels: list[_Parcel] = []
        self._input: int | None = None

    def takes(self, x: Tensor) -> None:
        """Of what is saved through `pack_input`, only x travels: later layers may read the rest."""
        self._input = x.data_ptr()

    def pack_input(self, x: Tensor) -> Tensor | _Parcel:
        """As `pack`, for what autograd saves around the block."""
        return self.pack(x) if x.data_ptr() == self._input else self._staying(x)

    def pack(self, x: Tensor) -> Tensor | _Parcel:
        """What stands for a tensor that is kept; large ones begin to travel."""
        if self.stays or x.nbytes < LEAST_BYTES or isinstance(x, torch.nn.Parameter):
            return self._staying(x)
        parcel = _Parcel(self.copies.send(x.detach()))
        self._parcels.append(parcel)
        return parcel

    def unpack(self, kept: Tensor | _Parcel) -> Tensor:
        """The tensor; what the block before keeps begins to come back too."""
        self.bring()
        if self.before is not None:
            self.before.bring()
        if isinstance(kept, Tensor):
            return kept
        coming = self.copies.bring(kept.sent) if kept.coming is None else kept.coming
        kept.coming = None
        return self.copies.arrive(coming)

    def bring(self) -> None:
        """Begins to bring everything back, once."""
        parcels, self._parcels = self._parcels, []
        for parcel in parcels:
            parcel.coming = self.copies.bring(parcel.sent)

    def _staying(self, x: Tensor) -> Tensor:
        return x


Departure = Callable[[bool], Journey]


def departures(copies: Copies | None) -> Departure | None:
    """For one forward, what gives each block in turn its journey, told whether it is the last; None without copies."""
    if copies is None:
        return None
    before: Journey | None = None

    def depart(last: bool) -> Journey:
        nonlocal before
        before = Journey(copies, before, stays=last)
        return before

    return depart
