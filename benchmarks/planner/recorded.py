"""Recorded: what a process sends by collectives of torch.distributed, whoever calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from longreach.trainer.zero import experts

FEW = 64  # bytes


class Recorded:
    """Bytes of the collectives that are called within, by name, as rings send them; sums of a few numbers apart.

    Such sums are a gradient's norm and whether it is finite.

    DeepSpeed remembers functions of torch.distributed when it starts: it has to start within.
    """

    def __init__(self) -> None:
        self.bytes, self.small = Counter[str](), Counter[str]()
        self._inside = False

    def __enter__(self) -> Recorded:
        share = {  # bytes of a rank from the tensor that is named first below, and the ranks
            "all_reduce": lambda x, n: 2 * (n - 1) * x // n,
            "reduce": lambda x, n: (n - 1) * x // n,
            "all_gather_into_tensor": lambda x, n: (n - 1) * x // n,
            "reduce_scatter_tensor": lambda x, n: (n - 1) * x,
            "broadcast": lambda x, n: (n - 1) * x // n,
            "all_gather": lambda x, n: (n - 1) * x // n,
        }
        self._original = {name: getattr(dist, name) for name in share}
        self._gather = experts.all_gather
        experts.all_gather = partial(self._call, "all_gather_into_tensor", share["all_gather_into_tensor"])
        for name, bytes_of in share.items():
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, partial(self._call, name, bytes_of))
        return self

    def __exit__(self, *error: object) -> None:
        experts.all_gather = self._gather
        for name, original in self._original.items():
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, original)

    def _call(self, name: str, bytes_of: Callable[[int, int], int], *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        held = sum(x.nbytes for x in first) if isinstance(first, list) else first.nbytes
        if not self._inside:
            group = kwargs.get("group")
            of_few = name == "all_reduce" and held <= FEW
            (self.small if of_few else self.bytes)[name] += bytes_of(held, dist.get_world_size(group))
        self._inside, before = True, self._inside
        try:
            return self._original[name](*args, **kwargs)
        finally:
            self._inside = before
