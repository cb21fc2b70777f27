"""Schedules: the learning rate of every step, from the step's number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .requirements import at_least

KINDS = ("cosine", "wsd")
EXTENSIONS = ("stretch", "hold", "rewarm")


@dataclass
class ScheduleSettings:
    """Linear warm-up, then `cosine` (Loshchilov and Hutter, 2017, arXiv 1608.03983) or `wsd`, warmup-stable-decay
    (Hu et al., 2024, arXiv 2404.06395), which stays at the peak and falls linearly over the last `decay_steps`.
    """

    kind: str = "cosine"  # or wsd: warm-up, stable, decay
    warmup_steps: int | None = None  # null: a fiftieth of trainer.steps, at least 1
    decay_steps: int | None = None  # wsd only; null: a fifth of trainer.steps
    final_fraction: float = 0.1  # learning rate of the last step, as a fraction of the peak; 0 is met one step later
    extension: str = "stretch"  # resumed with more steps: as if from the start with them; hold the last rate; or rewarm
    extended: list[dict[str, Any]] = field(default_factory=list)  # what was extended: a resumed run sets it itself


@dataclass(frozen=True)
class Schedule:
    """The learning rate of step first + s, s = 0, 1, …, steps − 1; W warm-up steps, D decay steps, f final fraction.

        warm-up  s < W            peak (s + 1) / W
        cosine   otherwise        peak (f + (1 − f) (1 + cos(pi x)) / 2),  x = (s + 1 − W) / (E − W)
        wsd      s < steps − D    peak
                 otherwise        peak (1 − (1 − f) x),                    x = (s + 1 − steps + D) / (E − steps + D)

    E = steps, so that the last step is taken at the final fraction; or, since a step at rate 0 would train nothing,
    E = steps + 1 where f = 0. Steps past the end keep the last rate. Raises ValueError where the parts do not fit into
    the steps.

    A run of n steps that was extended after step a keeps its rates up to there; from then on it either holds the last
    of them, r, or it warms up from r to the peak and then follows the schedule of steps − a steps.
    """

    settings: ScheduleSettings
    peak: float
    steps: int
    first: int = 0  # steps that the run takes before the first of these
    span: str = field(default="trainer.steps", compare=False)  # what messages call `steps`

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
        at_least("trainer.steps", self.steps, 1)
        if chosen.warmup_steps is not None and chosen.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must not be negative; got {chosen.warmup_steps}")
        if chosen.decay_steps is not None and chosen.decay_steps < 1:
            raise ValueError(f"schedule.decay_steps must be at least 1; got {chosen.decay_steps}")
        if chosen.extension not in EXTENSIONS:
            raise ValueError(f"schedule.extension must be one of {', '.join(EXTENSIONS)}; got {chosen.extension!r}")
        if chosen.extended and (before := self._before.steps) >= self.steps:
            raise ValueError(f"trainer.steps must be more than the {before} that are extended; got {self.steps}")
        if chosen.extended:
            _ = self._rest
        elif self.warmup + self.decay > self.steps:
            raise ValueError(
                f"schedule.warmup_steps and schedule.decay_steps must fit into {self.span}={self.steps}; "
                f"got {self.warmup} and {self.decay}. Lower them or raise {self.span}"
            )

    @property
    def warmup(self) -> int:
        chosen = self.settings.warmup_steps
        return max(1, self.steps // 50) if chosen is None else chosen

    @property
    def decay(self) -> int:
        if self.settings.kind != "wsd":
            return 0
        chosen = self.settings.decay_steps
        return self.steps // 5 if chosen is None else chosen

    @property
    def _before(self) -> Schedule:
        """What was extended last."""
        *earlier, last = self.settings.extended
        return Schedule(replace(self.settings, extended=earlier), self.peak, last["steps"])

    @property
    def _rest(self) -> Schedule:
        """The schedule of the steps after the extension, as of a run of its own."""
        return Schedule(
            replace(self.settings, extended=[]), self.peak, self.steps - self.settings.extended[-1]["after"]
        )

    def _extended(self, step: int) -> float:
        after, how = (self.settings.extended[-1][key] for key in ("after", "how"))
        if step < after:
            return self._before(step)
        last, rest = self._before(after - 1), self._rest
        if how == "hold":
            return last
        if step - after < rest.warmup:
            return last + (self.peak - last) * (step - after + 1) / rest.warmup
        return rest(step - after)

    def __call__(self, step: int) -> float:
        if self.settings.extended:
            return self._extended(step)
        floor, step = self.settings.final_fraction, min(step - self.first, self.steps - 1)
        end = self.steps + (floor == 0)
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.settings.kind == "cosine":
            x = (step + 1 - self.warmup) / (end - self.warmup)
            return self.peak * (floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2)
        start = self.steps - self.decay
        if step < start:
            return self.peak
        return self.peak * (1 - (1 - floor) * (step + 1 - start) / (end - start))

    @property
    def extendable(self) -> int | None:
        """The last step after which more steps can be added without a jump: wsd before its decay; cosine has none."""
        if self.settings.extended:
            last = self.settings.extended[-1]
            own = self._rest.extendable
            return None if last["how"] == "hold" or own is None else last["after"] + own
        return self.first + self.steps - self.decay if self.settings.kind == "wsd" else None

    @property
    def parts(self) -> dict[str, Any]:
        """All that it depends on, by the name of the setting, with defaults resolved."""
        return {
            "trainer.steps": self.steps,
            "optimizer.learning_rate": self.peak,
            "schedule.kind": self.settings.kind,
            "schedule.warmup_steps": self.warmup,
            "schedule.decay_steps": self.decay,
            "schedule.final_fraction": self.settings.final_fraction,
            "schedule.extended": [f"{each['how']} after step {each['after']}" for each in self.settings.extended],
        }

    def announcement(self, before: Schedule, step: int, after: Schedule | None = None) -> str | None:
        """The notice for a run that followed `before` for `step` steps, which by now are of this schedule; None if the
        two agree.

        after: the schedule of the next steps, that of a stage which begins there; by default this one.
        """
        old, after = before.parts, after or self
        changed = [f"{name} was {old[name]} and is {new}" for name, new in self.parts.items() if old[name] != new]
        if not changed or step < 1 or step >= after.first + after.steps:
            return None
        last, following = before(step - 1), after(step)
        return (
            f"the schedule has changed: {', '.join(changed)}. The learning rate was {last:.3g} at step {step} and is "
            f"{following:.3g} at step {step + 1} (x {following / last:.3g})"
        )


def schedule_in(state: dict[str, Any]) -> Schedule:
    """The schedule that `asdict` has made a part of a checkpoint's state. Raises ValueError where there is none."""
    try:
        kept = state["schedule"]
        return Schedule(**kept | {"settings": ScheduleSettings(**kept["settings"])})
    except (KeyError, TypeError) as error:
        told = f"a checkpoint must hold the schedule of its stage; got none that can be read ({error})"
        raise ValueError(told) from None


def schedule_of(config: dict[str, Any]) -> Schedule:
    """The schedule of a run's config.yaml. Raises ValueError where that does not describe one."""
    try:
        settings = ScheduleSettings(**config["schedule"])
        return Schedule(settings, float(config["optimizer"]["learning_rate"]), int(config["trainer"]["steps"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.yaml must hold the run's schedule; got none that can be read ({error})") from None


def extended(settings: ScheduleSettings, steps: int, config: dict[str, Any], step: int) -> ScheduleSettings:
    """The settings of a run of `steps` steps that goes on after `step` from a checkpoint with this config.yaml.

    They are those given, and what the run was extended by before; and where it has more steps than it had, and is not
    to be stretched, what it is extended by now. Raises ValueError where config.yaml does not hold the schedule.
    """
    if settings.extended or settings.extension == "stretch" or step < 1:
        return settings
    before = schedule_of(config)
    if steps < before.steps:
        return settings
    earlier = before.settings.extended
    now = [{"after": step, "steps": before.steps, "how": settings.extension}] if steps > before.steps else []
    return replace(settings, extended=[*earlier, *now])
