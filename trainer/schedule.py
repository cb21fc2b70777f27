"""Schedules: the learning rate of every step, from the step's number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("cosine", "wsd")


@dataclass
class ScheduleSettings:
    """Linear warm-up, then `cosine` (Loshchilov and Hutter, 2017, arXiv 1608.03983) or `wsd`, warmup-stable-decay
    (Hu et al., 2024, arXiv 2404.06395), which stays at the peak and falls linearly over the last `decay_steps`.
    """

    kind: str = "cosine"  # or wsd: warm-up, stable, decay
    warmup_steps: int | None = None  # null: a fiftieth of trainer.steps, at least 1
    decay_steps: int | None = None  # wsd only; null: a fifth of trainer.steps
    final_fraction: float = 0.1  # learning rate of the last step, as a fraction of the peak


@dataclass(frozen=True)
class Schedule:
    """The learning rate of step s = 0, 1, …, steps − 1; W warm-up steps, D decay steps, f the final fraction.

        warm-up  s < W            peak (s + 1) / W
        cosine   otherwise        peak (f + (1 − f) (1 + cos(pi x)) / 2),  x = (s + 1 − W) / (steps − W)
        wsd      s < steps − D    peak
                 otherwise        peak (1 − (1 − f) x),                    x = (s + 1 − steps + D) / D

    Steps past the end keep the last rate. Raises ValueError where the parts do not fit into the steps.
    """

    settings: ScheduleSettings
    peak: float
    steps: int

    def __post_init__(self) -> None:
        chosen = self.settings
        if chosen.kind not in KINDS:
            raise ValueError(f"schedule.kind must be one of {', '.join(KINDS)}; got {chosen.kind!r}")
        if not 0 <= chosen.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction must lie within 0..1; got {chosen.final_fraction}")
        if chosen.kind != "wsd" and chosen.decay_steps is not None:
            raise ValueError(
                f"schedule.decay_steps must come with schedule=wsd; got {chosen.decay_steps} with {chosen.kind}"
            )
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ValueError(f"optimizer.learning_rate must be a positive number; got {self.peak}")
        if chosen.warmup_steps is not None and chosen.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must not be negative; got {chosen.warmup_steps}")
        if chosen.decay_steps is not None and chosen.decay_steps < 1:
            raise ValueError(f"schedule.decay_steps must be at least 1; got {chosen.decay_steps}")
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"schedule.warmup_steps and schedule.decay_steps must fit into trainer.steps={self.steps}; "
                f"got {self.warmup} and {self.decay}. Lower them or raise trainer.steps"
            )

    @property
    def warmup(self) -> int:
        given = self.settings.warmup_steps
        return max(1, self.steps // 50) if given is None else given

    @property
    def decay(self) -> int:
        if self.settings.kind != "wsd":
            return 0
        given = self.settings.decay_steps
        return self.steps // 5 if given is None else given

    def __call__(self, step: int) -> float:
        floor = self.settings.final_fraction
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.settings.kind == "cosine":
            x = min(1.0, (step + 1 - self.warmup) / max(1, self.steps - self.warmup))
            return self.peak * (floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2)
        if step < self.steps - self.decay or self.decay == 0:
            return self.peak
        x = min(1.0, (step + 1 - self.steps + self.decay) / self.decay)
        return self.peak * (1 - (1 - floor) * x)
