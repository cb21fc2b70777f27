"""Zero: what a rank sends for DeepSpeed's ZeRO in a step; benchmarks/planner/validate.py counts it in real steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..settings import Settings

SMALLEST_SPLIT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: stage 3 keeps smaller parameters whole
BUCKET = 500_000_000  # numbers: its reduce_bucket_size


class ZeroSend(NamedTuple):
    """Bytes that a rank sends in a step, as rings send them; overlapped: beside computation."""

    what: str
    bytes: int
    overlapped: bool = False


def zero_sends(model: nn.Module, settings: Settings, ranks: int, micro_batches: int = 1) -> list[ZeroSend]:
    """Of a model in the types that it computes with. Experts that ranks share out are in neither."""
    return []


def held_by_zero(model: nn.Module, settings: Settings) -> int:
    """Bytes that the account does not have: what stage 3 gathers for two blocks, what stage 2 collects in a bucket."""
    blocks = getattr(model, "blocks", [])
    largest = max((sum(x.numel() * x.itemsize for x in block.parameters()) for block in blocks), default=0)
    if settings.engine.zero_stage == 3:
        return 2 * largest
    if settings.engine.zero_stage == 2:
        numbers = sum(x.numel() for x in model.parameters())
        return min(BUCKET, numbers) * (2 if settings.trainer.dtype == "bfloat16" else 4)
    return 0
