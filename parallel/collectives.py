"""Collectives on the ranks that share a row: gathers, halos, exchanges with neighbours, agreement on errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Group
from .sequence import Sequence
from .threads import ThreadGroup, this_rank
from .waiting import Waits

# torch 2.13 renamed it; 2.11 has only the old name.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_sent_by_process: Counter[str] = Counter()
_waits_of_process = Waits()


class Work(Protocol):
    """A message or a collective under way."""

    def wait(self) -> Any: ...


def sent() -> Counter[str]:
    """Bytes that this rank has sent to others, by kind of collective, since it began (as rings send them)."""
    rank = this_rank()
    return _sent_by_process if rank is None else rank.sent


def waits() -> Waits:
    """The time in which what this rank computes has waited for these collectives."""
    rank = this_rank()
    return _waits_of_process if rank is None else rank.waits


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts what this rank sends inside the block; the yielded counter is filled at its end."""
    before, counts = sent().copy(), Counter[str]()
    yield counts
    counts.update(sent() - before)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Packed:
    """Tensors as one flat message per type; `tensors` are views of the messages."""

    def __init__(self, flats: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
        self.flats = flats
        parts = {flat.dtype: iter(flat.split([x.numel() for x in tensors if x.dtype == flat.dtype])) for flat in flats}
        self.tensors = tuple(next(parts[x.dtype]).view(x.shape) for x in tensors)

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Packed:
        return cls([torch.cat([x.reshape(-1) for x in same]) for same in _by_type(tensors)], tensors)

    @classmethod
    def like(cls, tensors: tuple[Tensor, ...]) -> Packed:
        """Messages without values, to receive such tensors."""
        return cls([same[0].new_empty(sum(x.numel() for x in same)) for same in _by_type(tensors)], tensors)

    def to(self, peer: int) -> list[tuple[Tensor, int]]:
        """The messages and the rank that they go to, or come from, as `exchange` takes them."""
        return [(flat, peer) for flat in self.flats]

    def add(self, other: Packed) -> None:
        for mine, theirs in zip(self.flats, other.flats, strict=True):
            mine += theirs


def _by_type(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    return [[x for x in tensors if x.dtype == dtype] for dtype in dict.fromkeys(x.dtype for x in tensors)]


class Gathering:
    """An all-gather under way, of one `[spans, …]` tensor per rank; `in_row_order` sorts its result."""

    def __init__(self, x: Tensor, seq: Sequence) -> None:
        self._source = x.contiguous()
        self._out = x.new_empty((seq.layout.ranks, *x.shape))
        sent()["gather"] += (seq.layout.ranks - 1) * _bytes(self._source)
        out, source, self._work = self._out.view(-1), self._source.view(-1), None
        if isinstance(seq.group, ThreadGroup):
            with waits().measured(x.device):
                seq.group.all_gather(out, source)
        else:
            self._work = all_gather(out, source, group=seq.group, async_op=True)

    def wait(self) -> Tensor:
        """`[P, spans, …]`."""
        if self._work is not None:
            with waits().measured(self._out.device):
                self._work.wait()
        return self._out


def in_row_order(gathered: Tensor, seq: Sequence) -> list[Tensor]:
    """`[P, spans, …]` to one tensor per span, in the order of the row."""
    layout = seq.layout
    ordered: dict[int, Tensor] = {}
    for rank in range(layout.ranks):
        for turn, span in enumerate(layout.spans_of(rank)):
            ordered[span] = gathered[rank, turn]
    return [ordered[span] for span in range(layout.ranks * layout.spans)]


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """`[ranks, …]`, x[r] for rank r of the group, to what every rank sent to this one, by rank."""
    received = torch.empty_like(x)
    sent()["all to all"] += (x.shape[0] - 1) * _bytes(x) // x.shape[0]
    with waits().measured(x.device):
        if isinstance(group, ThreadGroup):
            group.all_to_all(received, x)
        else:
            dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def all_to_all_rows(x: Tensor, sends: list[int], receives: list[int], group: Group) -> Tensor:
    """`[sum of sends, …]`, the first sends[0] rows for rank 0 of the group and so on, to `[sum of receives, …]`."""
    x = x.contiguous()
    received = x.new_empty(sum(receives), *x.shape[1:])
    own = group.rank if isinstance(group, ThreadGroup) else group.rank()
    sent()["all to all"] += (x.shape[0] - sends[own]) * (_bytes(x) // max(1, x.shape[0]))
    with waits().measured(x.device):
        if isinstance(group, ThreadGroup):
            group.all_to_all_rows(received, x, sends)
        else:
            dist.all_to_all_single(received, x, receives, sends, group=group)
    return received


def sum_over_ranks(x: Tensor, seq: Sequence) -> None:
    """Makes x, in place, the sum of what every rank has."""
    ranks = seq.layout.ranks
    sent()["sum"] += 2 * (ranks - 1) * _bytes(x) // ranks
    with waits().measured(x.device):
        if isinstance(seq.group, ThreadGroup):
            seq.group.all_reduce(x)
        else:
            dist.all_reduce(x, group=seq.group)


def scatter_sum(parts: Tensor, seq: Sequence) -> Tensor:
    """The sum of all ranks' parts for this rank, in the order of ranks; `parts` `[P, …]` has one for each rank."""
    if seq.group is None:
        return parts[0]
    received = all_to_all(parts, seq.group)
    total = received[0]
    for part in received[1:]:
        total = total + part
    return total


def exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], seq: Sequence) -> list[Work]:
    """Starts point-to-point messages with ranks of the sequence group; every rank calls in the same order.

    The tensors must be contiguous and stay untouched until the works are waited for.
    """
    if seq.group is None or not (sends or receives):
        return []
    device = (sends or receives)[0][0].device
    sent()["exchange"] += sum(_bytes(t) for t, _ in sends)
    if isinstance(seq.group, ThreadGroup):
        return [_Exchanged(seq.group.exchange(sends, receives), device)]
    ops = [dist.P2POp(dist.isend, t, group=seq.group, group_peer=peer) for t, peer in sends]
    ops += [dist.P2POp(dist.irecv, t, group=seq.group, group_peer=peer) for t, peer in receives]
    return [_Exchanged(dist.batch_isend_irecv(ops), device)]


def finish(works: list[Work]) -> None:
    """Waits for the messages of an `exchange`."""
    for work in works:
        work.wait()


class _Exchanged:
    """The messages of one exchange, under way."""

    def __init__(self, works: Iterable[Work], device: torch.device) -> None:
        self._works, self._device = works, device

    def wait(self) -> None:
        with waits().measured(self._device):
            for work in self._works:
                work.wait()


def agree(error: str | None, ranks: int, group: Group | None = None) -> None:
    """Raises ValueError on all `ranks` of a group (default: all there are), with the first one's message, if any has an
    error.

    For checks before work starts: a rank that raised alone would leave the others waiting for it.
    """
    errors: list[str | None] = [error]
    rank = this_rank()
    if ranks > 1 and rank is not None and group is None:
        group = rank.group(range(rank.ranks))
    if isinstance(group, ThreadGroup):
        errors = group.all_gather_object(error)
    elif ranks > 1:
        errors = [None] * ranks
        dist.all_gather_object(errors, error, group=group)
    first = next((message for message in errors if message), None)
    if first:
        raise ValueError(first)
