"""The plan of a run: which steps and settings each stage has, and what is refused, without data, model or ranks."""

import math
from typing import Any

import pytest

from longreach.trainer.data.settings import MixtureSource
from longreach.trainer.schedule import Schedule, ScheduleSettings
from longreach.trainer.settings import Settings
from longreach.trainer.stages.plan import Plan, plan_of

MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "mixers": {"softmax": {"_target_": "a.Softmax", "_partial_": True, "heads": 2}},
}


def plan(*stages: dict[str, Any], **settings: Any) -> Plan:
    return plan_of(Settings(model=MODEL, stages=list(stages), **settings))


def test_a_run_without_stages_is_one() -> None:
    settings = Settings()
    (only,) = plan_of(settings).stages
    assert only.settings is settings
    assert (only.first, only.stop, only.rows, only.name) == (0, 1000, None, "")


def test_stages_follow_one_another_and_changes_stay() -> None:
    made = plan(
        {"steps": 10, "data.sequence_length": 512},
        {"tokens": 100_000, "name": "long", "data": {"sequence_length": 2048, "rows_per_step": 2}},
        {"steps": 3, "tokens_per_step": 8192, "model.mixers.softmax.rope_base": 1e6},
    )
    first, second, third = made.stages
    assert [(stage.name, stage.first, stage.stop) for stage in made.stages] == [
        ("1", 0, 10), ("long", 10, 35), ("3", 35, 38),
    ]  # fmt: skip
    assert second.stop - second.first == math.ceil(100_000 / 4096)
    assert [stage.settings.data.sequence_length for stage in made.stages] == [512, 2048, 2048]
    assert [stage.settings.data.rows_per_step for stage in made.stages] == [8, 2, 4]
    assert [stage.rows for stage in made.stages] == [80, 50, 12]
    assert all(stage.settings.trainer.steps == 38 for stage in made.stages)
    assert "rope_base" not in second.settings.model["mixers"]["softmax"]
    assert third.settings.model["mixers"]["softmax"]["rope_base"] == 1e6
    assert third.settings.model["mixers"]["softmax"]["heads"] == 2
    assert first.settings.run is third.settings.run  # what the run decides is known to all
    assert made.borders == (10, 35)
    assert [made.at(step).number for step in (0, 9, 10, 34, 35, 38)] == [0, 0, 1, 1, 2, 2]
    assert [made.behind(step).number for step in (1, 10, 11, 35, 36, 38)] == [0, 0, 1, 1, 2, 2]
    assert made.table()[1].split(maxsplit=3)[:3] == ["long", "steps", "11..35"]


def test_a_mapping_with_a_target_takes_the_place_of_another() -> None:
    made = plan({"steps": 1}, {"steps": 1, "model.mixers.softmax": {"_target_": "a.MoBA", "block_size": 4}})
    assert made.stages[1].settings.model["mixers"]["softmax"] == {"_target_": "a.MoBA", "block_size": 4}
    kept = plan({"steps": 1}, {"steps": 1, "model.mixers.softmax._target_": "a.MoBA"})
    assert kept.stages[1].settings.model["mixers"]["softmax"]["heads"] == 2


def test_a_mixture_changes_source_by_source_and_null_takes_one_out() -> None:
    made = plan(
        {"steps": 1, "data.mixture": {"a": {"path": "x"}, "b": {"path": "y", "weight": 2}}},
        {"steps": 1, "data.mixture.a": None, "data": {"mixture": {"b": {"weight": 3}, "c": {"path": "z"}}}},
        {"steps": 1, "data": {"mixture": {"c": None}}},
        {"steps": 1, "data.mixture": None, "data.source": "text", "data.path": "x"},
    )
    mixtures = [stage.settings.data.mixture for stage in made.stages]
    told = [{name: (each.path, each.weight) for name, each in mixture.items()} for mixture in mixtures]
    assert told == [{"a": ("x", 1), "b": ("y", 2)}, {"b": ("y", 3), "c": ("z", 1)}, {"b": ("y", 3)}, {}]


def test_what_computes_otherwise_with_the_same_parameters_and_states_may_change() -> None:
    """And goes back to what it was, where that is null or a rule that null takes out."""
    memory = {"trainer.tile_tokens": 64, "trainer.activation_checkpointing": {"softmax": "full"}, "checkpoint.every": 3}
    rule = {"match": ["*.query.weight"], "weight_decay": 0.0}
    optimizer = {"qk_clip": 50, "betas": [0.8, 0.9], "groups": {"queries": rule}, "eps": 1e-9}
    first, second, third = plan(
        {"steps": 1},
        {"steps": 1, **memory, "optimizer": optimizer, "engine": {"offload": "optimizer", "zero_stage": 2}},
        {"steps": 1, "optimizer": {"qk_clip": None, "groups": {"queries": None}}, "trainer.tile_tokens": None},
    ).stages
    assert (second.settings.optimizer.qk_clip, second.settings.optimizer.betas) == (50.0, (0.8, 0.9))
    assert (second.settings.engine.offload, second.settings.checkpoint.every) == ("optimizer", 3)
    assert (second.settings.trainer.tile_tokens, second.settings.trainer.steps) == (64, 3)
    assert list(second.settings.optimizer.rules) == ["queries"]
    third.settings.optimizer.check()
    assert (third.settings.optimizer.qk_clip, third.settings.optimizer.rules) == (None, {})
    assert (third.settings.trainer.tile_tokens, first.settings.optimizer.groups) == (None, {})


def test_a_schedule_lasts_until_a_stage_names_one() -> None:
    """One over the first two stages, and one over the last two: none jumps at a border that names none."""
    made = plan(
        {"steps": 10, "schedule.warmup_steps": 2},
        {"steps": 20, "data.sequence_length": 8192},
        {"steps": 6, "schedule.kind": "wsd", "schedule.decay_steps": 3, "optimizer.learning_rate": 1e-4},
        {"steps": 4, "data.rows_per_step": 2},
    )
    before = Schedule(ScheduleSettings("cosine", 2), 3e-4, 30)
    after = Schedule(ScheduleSettings("wsd", 2, 3), 1e-4, 10)
    rates = [made.at(step).schedule(step) for step in range(40)]
    assert rates == [before(step) for step in range(30)] + [after(step) for step in range(10)]
    assert made.stages[3].schedule.extendable == 37


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"steps": 1, "data.sequence_lenght": 3}, "Did you mean data.sequence_length?"),
        ({"steps": 1, "dta.sequence_length": 3}, "Did you mean data.sequence_length?"),
        ({"stepz": 1}, "steps or tokens must say how long it is; got neither"),
        ({"steps": 1, "tokens": 5}, "steps or tokens must say how long it is; got both"),
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"tokens": 1.5}, "tokens must be a whole number of at least 1; got 1.5"),
        ({"steps": 1, "length": 2}, "length must be a setting, or one of a stage's own"),
        ({"steps": 1, "trainer.dtype": "bfloat16"}, "trainer.dtype must stay the same in all stages"),
        ({"steps": 1, "optimizer.kind": "muon"}, "optimizer.kind must stay the same in all stages"),
        ({"steps": 1, "trainer.compile": True}, "trainer.compile must stay the same in all stages"),
        ({"steps": 1, "kernels.softmax_attention": "chunked"}, "kernels.softmax_attention must stay the same in all"),
        ({"steps": 1, "checkpoint.every": 0}, "checkpoint.every must be at least 1 with stages"),
        ({"steps": 1, "data.mixture.book": None}, "data.mixture.book must be there to be left out by null"),
        ({"steps": 1, "data.mixture.books": None}, "data.mixture must keep one of books; got null for each"),
        ({"steps": 1, "run.dir": "elsewhere"}, "run.dir must stay the same in all stages"),
        ({"steps": 1, "data.tokenizer": "bytes"}, "data.tokenizer must stay the same in all stages"),
        ({"steps": 1, "model.mixers.sofmax.rope_base": 1}, "Did you mean model.mixers.softmax?"),
        ({"steps": 1, "data.sequence_length": "long"}, "data.sequence_length must be of type int; got 'long'"),
        ({"steps": 1, "data.sequence_length": True}, "data.sequence_length must be of type int; got True"),
        ({"steps": 1, "data.sequence_length": 97}, "data.sequence_length must be a multiple of 2"),
        ({"steps": 1, "data.rows_per_step": 3, "parallel.sequence": 1}, "data.rows_per_step must be a multiple of 2"),
        ({"steps": 1, "parallel.sequence": 3}, "parallel.sequence must"),
        ({"steps": 1, "tokens_per_step": 5000}, "tokens_per_step must be a multiple of data.sequence_length=4096"),
        ({"steps": 4, "schedule.warmup_steps": 5}, "got 5 and 0"),
        ({"steps": 1, "trainer.activation_checkpointing": "some"}, "trainer.activation_checkpointing must be one of"),
        ({"steps": 1, "name": "1"}, "stages must have names of their own; got 1, 1"),
    ],
)
def test_a_bad_stage_is_refused_with_its_name(stage: dict[str, Any], message: str) -> None:
    settings = Settings(model=MODEL)
    settings.parallel.sequence = 2
    settings.data.mixture = {"books": MixtureSource(path="x")}
    settings.stages = [{"steps": 5}, stage]
    with pytest.raises(ValueError, match=r"^stages") as refused:
        plan_of(settings).check(2)
    assert message in str(refused.value)
    assert "names" in message or "stages[1] (2): " in str(refused.value)


def test_a_stage_begins_from_a_checkpoint() -> None:
    settings = Settings(model=MODEL, stages=[{"steps": 5}, {"steps": 5}])
    settings.checkpoint.every = 0
    with pytest.raises(ValueError, match=r"checkpoint\.every must be at least 1 with stages"):
        plan_of(settings).check(1)
    settings.stages.pop()
    plan_of(settings).check(1)


def test_what_extends_a_run_without_stages_is_refused() -> None:
    settings = Settings(model=MODEL, stages=[{"steps": 5}])
    settings.schedule.extension = "hold"
    with pytest.raises(ValueError, match=r"schedule\.extension must be left out with stages; got hold"):
        plan_of(settings)
