"""Learning rates against their definitions, and settings that do not fit."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.trainer.schedule import KINDS, Schedule, ScheduleSettings, extended, schedule_of
from longreach.trainer.settings import Settings


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
    got = rates(ScheduleSettings("wsd", warmup_steps=2, decay_steps=5, final_fraction=0.1), 1.0, 12)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28, 0.1])


def test_a_decay_to_nothing_ends_one_step_later() -> None:
    got = rates(ScheduleSettings("wsd", warmup_steps=2, decay_steps=4, final_fraction=0.0), 1.0, 12)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    got = rates(ScheduleSettings("cosine", warmup_steps=0, final_fraction=0.0), 1.0, 3)
    assert got == pytest.approx([(1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75)])


@given(st.data())
def test_no_step_is_taken_at_rate_0(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    steps = data.draw(st.integers(1, 10) | st.integers(1, 3000))
    warmup = data.draw(st.none() | st.integers(0, steps))
    room = steps - (max(1, steps // 50) if warmup is None else warmup)
    decay = data.draw(st.none() | st.integers(1, room)) if kind == "wsd" and room else None
    fraction = data.draw(st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1))
    if kind == "wsd" and decay is None and steps // 5 > room:
        return
    got = rates(ScheduleSettings(kind, warmup, decay, fraction), 1.0, steps)
    assert min(got) > 0
    assert max(got) <= 1
    end = room if kind == "cosine" else (steps // 5 if decay is None else decay)
    if end and fraction:
        assert got[-1] == pytest.approx(fraction)


def test_another_schedule_is_announced_with_the_rates_before_and_after() -> None:
    short = Schedule(ScheduleSettings("cosine"), 3e-4, 100)
    assert short.announcement(short, 50) is None
    said = Schedule(ScheduleSettings("cosine"), 3e-4, 200).announcement(short, 100)
    assert said is not None
    assert "trainer.steps was 100 and is 200" in said
    assert "was 3e-05 at step 100 and is 0.000167 at step 101 (x 5.57)" in said
    assert "optimizer.learning_rate was 0.0003 and is 0.001" in str(
        Schedule(ScheduleSettings("cosine"), 1e-3, 100).announcement(short, 7)
    )


def test_a_schedule_is_read_from_the_configuration_of_a_run() -> None:
    settings = Settings(schedule=ScheduleSettings("wsd", final_fraction=0.0))
    assert schedule_of(asdict(settings)) == Schedule(settings.schedule, 3e-4, 1000)
    with pytest.raises(ValueError, match="must hold the run's schedule"):
        schedule_of({"schedule": {"kind": "wsd"}})


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


def config_of(schedule: Schedule) -> dict[str, Any]:
    """What config.yaml says of a run with this schedule."""
    return {
        "schedule": asdict(schedule.settings),
        "optimizer": {"learning_rate": schedule.peak},
        "trainer": {"steps": schedule.steps},
    }


def extension(before: Schedule, how: str, step: int, steps: int) -> Schedule:
    """The schedule of a run that goes on after `step` with so many steps."""
    plain = replace(before.settings, extension=how, extended=[])
    return Schedule(extended(plain, steps, config_of(before), step), before.peak, steps)


@pytest.mark.parametrize("step", [100, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_extended_keeps_its_last_rate_or_warms_up_from_it(kind: str, step: int) -> None:
    before = Schedule(ScheduleSettings(kind), 1.0, 100)
    held, warm = extension(before, "hold", step, 200), extension(before, "rewarm", step, 200)
    for schedule in (held, warm):
        assert [schedule(s) for s in range(step)] == [before(s) for s in range(step)]
    assert {held(s) for s in range(step, 200)} == {before(step - 1)}
    alone = Schedule(ScheduleSettings(kind), 1.0, 200 - step)
    assert alone.warmup == 2
    assert warm(step) == pytest.approx((before(step - 1) + 1.0) / 2)
    assert [warm(s) for s in range(step + 1, 200)] == [alone(s) for s in range(1, 200 - step)]
    stretched = extension(before, "stretch", step, 200)
    assert [stretched(s) for s in range(200)] == rates(ScheduleSettings(kind), 1.0, 200)


def test_an_extension_outlives_a_restart_and_can_itself_be_extended() -> None:
    before = Schedule(ScheduleSettings("cosine"), 1.0, 100)
    first = extension(before, "rewarm", 100, 200)
    again = extension(first, "rewarm", 150, 200)  # interrupted on the way
    assert again == first
    assert first.announcement(again, 150) is None
    second = extension(first, "hold", 200, 250)
    assert [second(s) for s in range(200)] == [first(s) for s in range(200)]
    assert {second(s) for s in range(200, 250)} == {first(199)}
    assert first.extendable is None
    wsd = extension(Schedule(ScheduleSettings("wsd"), 1.0, 100), "rewarm", 100, 200)
    assert wsd.extendable == 180
    assert second.announcement(first, 200) is not None
    shorter = extension(first, "hold", 50, 120)
    assert shorter.settings.extended == []


def test_what_no_extension_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.extension must be one of stretch, hold, rewarm; got 'jump'"):
        Schedule(ScheduleSettings(extension="jump"), 1.0, 10)
    with pytest.raises(ValueError, match=r"trainer\.steps must be more than the 10 that are extended; got 10"):
        Schedule(ScheduleSettings(extended=[{"after": 5, "steps": 10, "how": "hold"}]), 1.0, 10)
