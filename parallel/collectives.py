"""Collectives on the ranks that share a row: gathers, halos, exchanges with neighbours, agreement on errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .operation import Tensors, mix
from .sequence import Sequence

# torch 2.13 renamed it; 2.11 has only the old name.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


sent: Counter[str] = Counter()
"""Bytes that this rank has sent to others, by kind of collective, since the process began (as rings send them)."""


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """What this rank sends within: the yielded counter is filled at the end."""
    before, found = sent.copy(), Counter[str]()
    yield found
    found.update(sent - before)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Gathering:
    """An all-gather under way, of one `[spans, …]` tensor a rank; `in_row_order` sorts what comes of it."""

    def __init__(self, x: Tensor, seq: Sequence) -> None:
        self._source = x.contiguous()
        self._out = x.new_empty((seq.layout.ranks, *x.shape))
        sent["gather"] += (seq.layout.ranks - 1) * _bytes(self._source)
        self._work = all_gather(self._out.view(-1), self._source.view(-1), group=seq.group, async_op=True)

    def wait(self) -> Tensor:
        """`[P, spans, …]`."""
        self._work.wait()
        return self._out


def in_row_order(gathered: Tensor, seq: Sequence) -> list[Tensor]:
    """`[P, spans, …]` to one tensor a span, in the order of the row."""
    layout = seq.layout
    ordered: dict[int, Tensor] = {}
    for rank in range(layout.ranks):
        for turn, span in enumerate(layout.spans_of(rank)):
            ordered[span] = gathered[rank, turn]
    return [ordered[span] for span in range(layout.ranks * layout.spans)]


@dataclass(frozen=True)
class Halo:
    """The `width` rows before each folded span: `[spans * B, L, …]` to `[spans * B, width, …]`.

    Rows before the start of the row are zero. Spans shorter than `width` take their halo from several spans. An
    `Operation`: one all-gather of `spans * min(width, L)` rows forward; backward one all-reduce of all spans' such
    rows, whose gradients are added up at the spans that own them.
    """

    width: int

    def forward(self, inputs: Tensors, seq: Sequence) -> tuple[Tensor, Tensors]:
        (x,) = inputs
        assert x is not None
        return _halo_forward(x, seq, self.width), ()

    def backward(self, dout: Tensor, inputs: Tensors, out: Tensor, saved: Tensors, seq: Sequence) -> Tensors:
        (x,) = inputs
        assert x is not None
        layout, batch, length = seq.layout, x.shape[0] // seq.layout.spans, x.shape[1]
        tail = min(self.width, length)
        dtails = dout.new_zeros(layout.ranks * layout.spans, batch, tail, *x.shape[2:])
        for span, part in zip(layout.spans_of(seq.rank), dout.chunk(layout.spans, dim=0), strict=True):
            for before, rows, source in _halo_parts(span, self.width, tail):
                dtails[before, :, source] += part[:, rows]
        sent["sum"] += 2 * (layout.ranks - 1) * _bytes(dtails) // layout.ranks
        dist.all_reduce(dtails, group=seq.group)
        dx = dout.new_zeros(x.shape)
        mine = torch.stack([dtails[span] for span in layout.spans_of(seq.rank)])
        dx[:, length - tail :] = mine.flatten(0, 1)
        return (dx,)

    def like(self, inputs: Tensors, ranks: int, spans: int) -> tuple[Tensor, Tensors]:
        (x,) = inputs
        assert x is not None
        return x.new_empty(x.shape[0], self.width, *x.shape[2:]), ()


def _halo_parts(span: int, width: int, tail: int) -> list[tuple[int, slice, slice]]:
    """Which rows of a span's halo come from which earlier span's tail, nearest first: (span, halo rows, tail rows)."""
    parts, filled, before = [], 0, span - 1
    while filled < width and before >= 0:
        take = min(tail, width - filled)
        parts.append((before, slice(width - filled - take, width - filled), slice(tail - take, tail)))
        filled += take
        before -= 1
    return parts


def _halo_forward(x: Tensor, seq: Sequence, width: int) -> Tensor:
    layout = seq.layout
    tail = min(width, x.shape[1])
    mine = x[:, x.shape[1] - tail :].unflatten(0, (layout.spans, -1))
    tails = in_row_order(Gathering(mine, seq).wait(), seq)
    halo = x.new_zeros(layout.spans, mine.shape[1], width, *x.shape[2:])
    for turn, span in enumerate(layout.spans_of(seq.rank)):
        for before, rows, source in _halo_parts(span, width, tail):
            halo[turn, :, rows] = tails[before][:, source]
    return halo.flatten(0, 1)


def halo(x: Tensor, seq: Sequence, width: int, slot: str) -> Tensor | None:
    """What `Halo` gives, `[spans * B, width, …]`; None on one rank, whose rows have nothing before them."""
    if seq.layout.ranks == 1 or width == 0:
        return None
    return mix(Halo, (width,), (x,), seq, slot)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[ranks, …]`, x[r] for rank r of the group, to what every rank sent to this one, by rank."""
    received = torch.empty_like(x)
    sent["all to all"] += (x.shape[0] - 1) * _bytes(x) // x.shape[0]
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def scatter_sum(parts: Tensor, seq: Sequence) -> Tensor:
    """Of `[P, …]`, one part for each rank: the sum of those that all ranks have for this one, in the order of ranks."""
    if seq.group is None:
        return parts[0]
    received = all_to_all(parts, seq.group)
    total = received[0]
    for part in received[1:]:
        total = total + part
    return total


def exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], seq: Sequence) -> list[dist.Work]:
    """Starts point-to-point messages with ranks of the sequence group; every rank calls in the same order.

    The tensors must be contiguous and stay untouched until the works are waited for.
    """
    if seq.group is None:
        return []
    sent["exchange"] += sum(_bytes(t) for t, _ in sends)
    ops = [dist.P2POp(dist.isend, t, group=seq.group, group_peer=peer) for t, peer in sends]
    ops += [dist.P2POp(dist.irecv, t, group=seq.group, group_peer=peer) for t, peer in receives]
    return dist.batch_isend_irecv(ops) if ops else []


def finish(works: list[dist.Work]) -> None:
    """Waits for the messages of an `exchange`."""
    for work in works:
        work.wait()


def agree(error: str | None, ranks: int, group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError on all `ranks` of a group (default: all there are), with the first one's message, if any has an
    error.

    For checks before work starts: a rank that raised alone would leave the others waiting for it.
    """
    errors: list[str | None] = [error]
    if ranks > 1:
        errors = [None] * ranks
        dist.all_gather_object(errors, error, group=group)
    first = next((message for message in errors if message), None)
    if first:
        raise ValueError(first)
