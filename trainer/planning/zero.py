"""Zero: what a rank sends for DeepSpeed's ZeRO in a step; benchmarks/planner/validate.py counts it in real steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..optimizers.groups import frozen_parameters, groups_of
from ..settings import Settings
from .gathering import gathered, persistent

ALIGNMENT = 2  # numbers to which DeepSpeed pads each rank's part of a flat tensor


class ZeroSend(NamedTuple):
    """Bytes that a rank sends in a step, as rings send them, among ranks that are so far `apart`, all or some of them.

    overlapped: beside computation.
    """

    what: str
    bytes: int
    overlapped: bool = False
    apart: int = 1


def zero_sends(model: nn.Module, settings: Settings, ranks: int, micro_batches: int = 1) -> list[ZeroSend]:
    """Of a model in the types that it computes with.

    Stages 0 to 2 sum gradients whole (an all-reduce of buckets), 1 and 2 then gather the parameters that others have
    stepped. Stage 3 gathers parameters where they are used, as `gathered` tells, and scatters the sums. The experts
    that ranks share out are none of DeepSpeed's: those that hold the same sum their gradients and gather the weights.
    """
    if ranks == 1:
        return []
    apart, experts = settings.parallel.experts, shared_out(model, settings)
    others = [x for x in model.parameters() if id(x) not in experts]
    own = _of_experts(list(experts.values()), apart, ranks // apart)
    stage, sizes = settings.engine.zero_stage, [(x.numel(), x.itemsize) for x in others]
    if stage < 3:
        numbers = sum(size for size, _ in sizes)
        times = micro_batches if stage == 2 else 1
        sums = ZeroSend("gradients, summed", times * _summed(4 * numbers, ranks))
        if stage == 0:
            return [sums, *own]
        flat = sum(_gathered(x, ranks) for x in _flat(model, settings, ranks, experts))
        return [sums, ZeroSend("parameters, gathered", flat), *own]
    small = persistent(settings)
    split = [(-(-n // ranks) * ranks, e) for n, e in sizes if n > small]
    kept = [(-(-n // ranks) * ranks, e) for n, e in sizes if n <= small]
    used = micro_batches * gathered(model, settings, ranks, experts).bytes
    scattered = sum(4 * n for n, _ in (*split, *kept))
    return [
        ZeroSend("parameters, gathered where they are used", _gathered(used, ranks), True),
        ZeroSend("small parameters, gathered", _gathered(sum(n * e for n, e in kept), ranks)),
        ZeroSend("gradients, summed and scattered", micro_batches * _gathered(scattered, ranks), True),
        *own,
    ]


def shared_out(model: nn.Module, settings: Settings) -> dict[int, Tensor]:
    """By id, the weights of experts that ranks share out, whole."""
    return {
        id(each): each for module in model.modules() for name in getattr(module, "by_expert", ())
        if settings.parallel.experts > 1 and isinstance(each := getattr(module, name), Tensor)
    }  # fmt: skip


def _of_experts(weights: list[Tensor], ranks: int, replicas: int) -> list[ZeroSend]:
    """`ranks` share them out, and so many hold the same ones; see `trainer.zero.experts.ExpertWeights`."""
    if not weights or replicas == 1:
        return []
    held = [(x.numel() // ranks, x.itemsize) for x in weights]
    sums = sum(_summed(4 * n, replicas) for n, _ in held)
    back = sum((replicas - 1) * -(-n // replicas) * size for n, size in held)
    return [
        ZeroSend("gradients of experts, summed", sums, apart=ranks),
        ZeroSend("parameters of experts, gathered", back, apart=ranks),
    ]


def _flat(model: nn.Module, settings: Settings, ranks: int, left_out: dict[int, Tensor]) -> Iterator[int]:
    """Bytes of the flat tensors of stages 1 and 2, one for each group of the optimizer, padded to whole parts."""
    unit = ranks * ALIGNMENT
    for group in groups_of(model, settings.optimizer, frozen_parameters(model, settings.optimizer.only)):
        of = [parameter for parameter in group["params"] if id(parameter) not in left_out]
        numbers = sum(parameter.numel() for parameter in of)
        if of:
            yield -(-numbers // unit) * unit * of[0].itemsize


def _summed(held: int, ranks: int) -> int:
    """Bytes that a rank sends of an all-reduce of `held` bytes."""
    return 2 * (ranks - 1) * held // ranks


def _gathered(held: int, ranks: int) -> int:
    """Bytes that a rank sends where `held` bytes are gathered, or summed and scattered."""
    return (ranks - 1) * held // ranks


def gathered_at_once(model: nn.Module, settings: Settings) -> int:
    """Bytes that the account does not have: what stage 3 holds gathered at most."""
    if settings.engine.zero_stage < 3:
        return 0
    return gathered(model, settings, 1, shared_out(model, settings)).most
