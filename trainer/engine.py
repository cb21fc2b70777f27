"""Engine: one model under DeepSpeed's ZeRO; the only importer of deepspeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101); norms, biases and other 1-D parameters do not decay."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class EngineSettings:
    """`zero_stage` 0..3, and `config`: more DeepSpeed settings, merged with those that LongReach sets."""

    zero_stage: int = 1
    config: dict[str, Any] = field(default_factory=dict)
