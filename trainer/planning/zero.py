"""Zero: what a rank sends for DeepSpeed's ZeRO in a step; benchmarks/planner/validate.py counts it in real steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..optimizers.groups import frozen_parameters, groups_of
from ..settings import Settings

SMALLEST_SPLIT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: stage 3 keeps smaller parameters whole
ALIGNMENT = 2  # numbers to which DeepSpeed pads each rank's part of a flat tensor
NEAR = 1_000_000_000  # numbers: its max_reuse_distance: what is used again so soon stays gathered


class ZeroSend(NamedTuple):
    """Bytes that a rank sends in a step, as rings send them; overlapped: beside computation."""

    what: str
    bytes: int
    overlapped: bool = False


def zero_sends(model: nn.Module, settings: Settings, ranks: int, micro_batches: int = 1) -> list[ZeroSend]:
    """Of a model in the types that it computes with, without the experts that ranks share out.

    Stages 0 to 2 sum gradients whole (an all-reduce of buckets), 1 and 2 then gather the parameters that others have
    stepped. Stage 3 gathers each parameter where it is used, twice unless its next use is near, and scatters the sums.
    """
    if ranks == 1:
        return []
    stage, sizes = settings.engine.zero_stage, [(x.numel(), x.itemsize) for x in model.parameters()]
    if stage < 3:
        numbers = sum(size for size, _ in sizes)
        times = micro_batches if stage == 2 else 1
        sums = ZeroSend("gradients, summed", times * _summed(4 * numbers, ranks))
        if stage == 0:
            return [sums]
        return [sums, ZeroSend("parameters, gathered", sum(_gathered(x, ranks) for x in _flat(model, settings, ranks)))]
    split = [(-(-n // ranks) * ranks, e) for n, e in sizes if n > SMALLEST_SPLIT]
    kept = [(-(-n // ranks) * ranks, e) for n, e in sizes if n <= SMALLEST_SPLIT]
    near = min(1.0, NEAR / max(1, sum(n for n, _ in split)))
    gathers = micro_batches * (2 - near)
    used = sum(n * e for n, e in split)
    scattered = sum(4 * n for n, _ in (*split, *kept))
    return [
        ZeroSend("parameters, gathered where they are used", round(gathers * _gathered(used, ranks)), True),
        ZeroSend("small parameters, gathered", _gathered(sum(n * e for n, e in kept), ranks)),
        ZeroSend("gradients, summed and scattered", micro_batches * _gathered(scattered, ranks), True),
    ]


def _flat(model: nn.Module, settings: Settings, ranks: int) -> Iterator[int]:
    """Bytes of the flat tensors of stages 1 and 2, one for each group of the optimizer, padded to whole parts."""
    unit = ranks * ALIGNMENT
    for group in groups_of(model, settings.optimizer, frozen_parameters(model, settings.optimizer.only)):
        numbers = sum(parameter.numel() for parameter in group["params"])
        yield -(-numbers // unit) * unit * group["params"][0].itemsize


def _summed(held: int, ranks: int) -> int:
    """Bytes that a rank sends of an all-reduce of `held` bytes."""
    return 2 * (ranks - 1) * held // ranks


def _gathered(held: int, ranks: int) -> int:
    """Bytes that a rank sends where `held` bytes are gathered, or summed and scattered."""
    return (ranks - 1) * held // ranks


def gathered_at_once(model: nn.Module, settings: Settings) -> int:
    """Bytes that the account does not have: what stage 3 gathers of two blocks, one of them ahead."""
    blocks = getattr(model, "blocks", [])
    largest = max((sum(x.nbytes for x in block.parameters()) for block in blocks), default=0)
    return 2 * largest if settings.engine.zero_stage == 3 else 0
