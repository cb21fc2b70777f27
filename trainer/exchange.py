"""Exchange: small values between all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.collectives import agree, all_gather
from ..parallel.mesh import Mesh

Result = TypeVar("Result")


def gather_numbers(numbers: list[float], mesh: Mesh) -> Tensor:
    """float64 `[ranks, n]` on the host: every rank's numbers, so that sums do not depend on how a reduction runs."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if mesh.world_size == 1:
        return mine.unsqueeze(0)
    gathered = torch.empty(mesh.world_size, len(numbers), dtype=torch.float64)
    all_gather(gathered.view(-1), mine)
    return gathered


def from_first_rank(value: Any, mesh: Mesh) -> Any:
    """The first rank's value, on every rank."""
    if mesh.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]


def together(mesh: Mesh, action: Callable[[], Result]) -> Result:
    """`action()` on every rank; a ValueError of any rank is raised on all, so that none waits for one that stopped."""
    error, result = None, None
    try:
        result = action()
    except ValueError as raised:
        error = str(raised)
    agree(error, mesh.world_size)
    return cast(Result, result)
