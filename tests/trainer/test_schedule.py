"""Learning rates against their definitions, and settings that do not fit."""

import math

import pytest

from longreach.trainer.schedule import Schedule, ScheduleSettings


def rates(settings: ScheduleSettings, peak: float, steps: int) -> list[float]:
    schedule = Schedule(settings, peak, steps)
    return [schedule(step) for step in range(steps)]


def test_cosine_warms_up_and_ends_at_the_final_fraction() -> None:
    got = rates(ScheduleSettings("cosine", warmup_steps=4, final_fraction=0.1), 2.0, 20)
    assert got[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 20):
        x = (step - 3) / 16
        assert got[step] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2), rel=1e-12)
    assert got[-1] == pytest.approx(0.2, rel=1e-12)


def test_wsd_stays_and_then_falls_linearly() -> None:
    got = rates(ScheduleSettings("wsd", warmup_steps=2, decay_steps=5, final_fraction=0.0), 1.0, 12)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_defaults_follow_the_number_of_steps() -> None:
    schedule = Schedule(ScheduleSettings("wsd"), 1.0, 200)
    assert (schedule.warmup, schedule.decay) == (4, 40)
    assert len(rates(ScheduleSettings("wsd"), 1.0, 1)) == 1  # a single step fits too
    assert Schedule(ScheduleSettings(), 1.0, 10)(25) == pytest.approx(0.1)  # past the end: the last rate


@pytest.mark.parametrize(
    ("settings", "peak", "message"),
    [
        (ScheduleSettings("linear"), 1.0, "schedule.kind must be one of cosine, wsd; got 'linear'"),
        (ScheduleSettings("cosine", decay_steps=3), 1.0, "schedule.decay_steps must come with schedule=wsd"),
        (ScheduleSettings("wsd", warmup_steps=8, decay_steps=3), 1.0, "must fit into trainer.steps=10; got 8 and 3"),
        (ScheduleSettings(final_fraction=2.0), 1.0, "schedule.final_fraction must lie within 0..1"),
        (ScheduleSettings(warmup_steps=-1), 1.0, "schedule.warmup_steps must not be negative"),
        (ScheduleSettings(), math.nan, "optimizer.learning_rate must be a positive number; got nan"),
    ],
)
def test_what_does_not_fit_is_refused(settings: ScheduleSettings, peak: float, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Schedule(settings, peak, 10)
