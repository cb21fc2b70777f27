"""Mesh: the (data, sequence) grid of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias, cast

import torch
import torch.distributed as dist

from .threads import ThreadGroup, this_rank

Group: TypeAlias = dist.ProcessGroup | ThreadGroup
"""Ranks that communicate: processes of torch.distributed, or threads of this process."""


@dataclass(frozen=True)
class Heads:
    """Ranks of a row that exchange tokens for heads (Ulysses): `ranks` neighbours, joined by `group`.

    `ring` joins this rank with those that hold the same heads of other tokens; None where there are no others.
    """

    ranks: int
    group: Group
    ring: Group | None = None


@dataclass(frozen=True)
class Experts:
    """Ranks that share out the experts of each layer: this one is number `rank` of `ranks` neighbours, `group`.

    `replicas` joins this rank with those that hold the same experts; None where there are no others.
    """

    ranks: int
    rank: int
    group: Group
    replicas: Group | None = None

    def held(self, experts: int) -> range:
        """Which of so many experts this rank holds."""
        count = experts // self.ranks
        return range(self.rank * count, (self.rank + 1) * count)


@dataclass(frozen=True)
class Mesh:
    """Rank r = data_rank * sequence_ranks + sequence_rank: the ranks that share a row are neighbours.

    `sequence_group` joins those that share rows, and `heads` those of them that exchange tokens for heads, if any do;
    both are None on a single process without torch.distributed. `experts` joins this rank with the neighbours among
    which the experts of each layer are shared out, and `replicas` with those that hold the same experts; both are None
    where every rank holds all experts. Ranks are processes, or threads of one process (`run_as_threads`).
    """

    rank: int = 0
    world_size: int = 1
    sequence_ranks: int = 1
    sequence_group: Group | None = None
    heads: Heads | None = None
    experts: Experts | None = None

    @classmethod
    def create(cls, sequence: int = 1, ulysses: int = 1, experts: int = 1, timeout_minutes: float = 10.0) -> Mesh:
        """The mesh of all ranks, `sequence` ranks per row; every rank must call it.

        `ulysses` of a row's ranks exchange tokens for heads, where the strategy is Ulysses. `experts` neighbours, of
        one row or of several, share out the experts. A rank that is silent for
        `timeout_minutes` in a collective of a group that is made here ends the run; give what the default group got.
        When it returns, every group has run a collective. Raises ValueError, on every rank alike and before any group
        is made, if the ranks do not divide evenly.
        """
        rank, world = _place()
        check_sequence_ranks(sequence, world)
        check_ulysses_ranks(ulysses, sequence)
        check_expert_ranks(experts, world)
        mesh, timeout = cls(rank, world), timedelta(minutes=timeout_minutes)
        if sequence > 1:
            row, heads = _group(sequence, 1, world, rank, timeout), None
            if ulysses == sequence:
                heads = Heads(ulysses, row)
            elif ulysses > 1:
                neighbours = _group(ulysses, 1, world, rank, timeout)
                heads = Heads(ulysses, neighbours, _group(sequence // ulysses, ulysses, world, rank, timeout))
            mesh = cls(rank, world, sequence, row, heads)
        if experts > 1:
            group, replicas = _group(experts, 1, world, rank, timeout), None
            if experts < world:
                replicas = _group(world // experts, experts, world, rank, timeout)
            mesh = replace(mesh, experts=Experts(experts, rank % experts, group, replicas))
        if world > 1 and this_rank() is None:
            _connect(mesh.groups)
        return mesh

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group that this rank is in, once, in the same order on every rank; the first joins all."""
        heads = () if self.heads is None else (self.heads.group, self.heads.ring)
        experts = () if self.experts is None else (self.experts.group, self.experts.replicas)
        groups = (cast(dist.ProcessGroup, dist.group.WORLD), self.sequence_group, *heads, *experts)
        return list(dict.fromkeys(group for group in groups if isinstance(group, dist.ProcessGroup)))

    @property
    def all_ranks(self) -> Group:
        """The group of all ranks, where there are several."""
        thread = this_rank()
        return cast(dist.ProcessGroup, dist.group.WORLD) if thread is None else thread.group(range(self.world_size))

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_ranks

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_ranks


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    thread = this_rank()
    if thread is not None:
        return thread.rank, thread.ranks
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _group(size: int, stride: int, world: int, rank: int, timeout: timedelta) -> Group:
    """The group of this rank among those of `size` ranks, `stride` apart; every rank makes all of them."""
    thread = this_rank()
    if size == world and thread is None:
        return cast(dist.ProcessGroup, dist.group.WORLD)
    mine = None
    for block in range(0, world, size * stride):
        for first in range(block, block + stride):
            ranks = list(range(first, block + size * stride, stride))
            if thread is None:
                group = dist.new_group(ranks, timeout=timeout)
                mine = group if rank in ranks else mine
            elif rank in ranks:
                return thread.group(ranks)
    return cast(dist.ProcessGroup, mine)


def _connect(groups: list[dist.ProcessGroup]) -> None:
    """Runs one small collective on each group.

    NCCL makes its communicator in a group's first call, which all ranks of the group must enter: a first exchange in
    which some of them have nothing to send would be undefined.
    """
    for group in groups:
        device = "cuda" if "nccl" in dist.get_backend_config(group) else "cpu"
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def check_ulysses_ranks(ulysses: int, sequence: int) -> None:
    """Raises ValueError unless `ulysses` divides the ranks of a row."""
    if ulysses < 1 or sequence % ulysses:
        raise ValueError(
            f"parallel.ulysses must divide parallel.sequence, {sequence}; got {ulysses}. It is how many of a row's "
            "ranks exchange tokens for heads"
        )


def check_expert_ranks(experts: int, world_size: int) -> None:
    """Raises ValueError unless `experts` divides the number of processes."""
    if experts < 1 or world_size % experts:
        raise ValueError(
            f"parallel.experts must divide the number of processes, {world_size}; got {experts}. It is how many ranks "
            "share out the experts of each layer"
        )


def check_sequence_ranks(sequence: int, world_size: int) -> None:
    """Raises ValueError unless `sequence` divides the number of processes."""
    if sequence < 1:
        raise ValueError(f"parallel.sequence must be at least 1; got {sequence}. With 1 each rank holds whole rows")
    if world_size % sequence:
        raise ValueError(
            f"parallel.sequence must divide the number of processes, {world_size}; got {sequence}. "
            "Start more processes (torchrun --nproc-per-node) or lower parallel.sequence"
        )
