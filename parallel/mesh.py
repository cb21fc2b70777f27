"""Mesh: the (data, sequence) grid of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Rank r = data_rank * sequence_ranks + sequence_rank: the ranks that share a row are neighbours.

    `group` joins all ranks, `sequence_group` those that hold the same rows; both are None on a single process
    without torch.distributed.
    """

    rank: int = 0
    world_size: int = 1
    sequence_ranks: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @classmethod
    def create(cls, sequence: int = 1) -> Mesh:
        """The mesh of the initialised default process group, `sequence` ranks a row; every rank must call it.

        Raises ValueError, on every rank alike and before any group is made, if the ranks do not come out even.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        check_sequence_ranks(sequence, world)
        if sequence == 1:
            return cls(rank, world)
        if sequence == world:
            return cls(rank, world, sequence, dist.group.WORLD)
        groups = [dist.new_group(list(range(start, start + sequence))) for start in range(0, world, sequence)]
        return cls(rank, world, sequence, cast(dist.ProcessGroup, groups[rank // sequence]))

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_ranks

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_ranks


def check_sequence_ranks(sequence: int, world_size: int) -> None:
    """Raises ValueError unless `sequence` ranks a row divide the processes."""
    if sequence < 1 or world_size % sequence:
        raise ValueError(
            f"parallel.sequence must divide the number of processes, {world_size}; got {sequence}. "
            "Start more processes (torchrun --nproc-per-node) or lower parallel.sequence"
        )
