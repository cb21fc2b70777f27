"""What can be known without data or model is refused before anything starts."""

import dataclasses

import pytest
import torch

from longreach.trainer.engine import OptimizerSettings
from longreach.trainer.engine_config import EngineSettings, configuration
from longreach.trainer.ranks.settings import layout_of
from longreach.trainer.settings import Settings, check


def changed(**values: object) -> Settings:
    """Settings with some values changed; `trainer__steps` is trainer.steps."""
    settings = Settings()
    for name, value in values.items():
        group, _, key = name.rpartition("__")
        owner = getattr(settings, group) if group else settings
        if group:
            setattr(settings, group, dataclasses.replace(owner, **{key: value}))
        else:
            setattr(settings, key, value)
    return settings


def test_the_defaults_fit_one_process() -> None:
    check(Settings(), 1)


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        (changed(parallel__sequence=4), 2, "parallel.sequence must divide the number of processes, 2; got 4"),
        (changed(parallel__sequence=2), 3, "parallel.sequence must divide the number of processes, 3; got 2"),
        (
            changed(parallel__sequence=4, data__sequence_length=1002),
            4,
            "data.sequence_length must be a multiple of 4 .* got 1002. Use 1000 or 1004",
        ),
        (
            changed(parallel__sequence=2, parallel__layout="zigzag", parallel__spans=3, data__sequence_length=16),
            2,
            "multiple of 6 .*2 ranks times 3 spans.* got 16. Use 12 or 18",
        ),
        (changed(data__rows_per_step=3), 2, "data.rows_per_step must be a multiple of 2 .* got 3. Use 4"),
        (changed(data__rows_per_step=4, data__rows_per_micro_batch=3), 1, "data.rows_per_step must be a multiple of 3"),
        (changed(parallel__layout="spiral"), 1, "parallel.layout must be one of contiguous, zigzag; got 'spiral'"),
        (changed(parallel__spans=2), 1, "parallel.spans must be 1 with parallel.layout=contiguous; got 2"),
        (changed(parallel__layout="zigzag", parallel__spans=1), 1, "parallel.spans must be at least 2"),
        (changed(parallel__attention="tree"), 1, "parallel.attention must be one of ring, gather"),
        (changed(trainer__dtype="float16"), 1, "trainer.dtype must be one of float32, bfloat16; got 'float16'"),
        (changed(trainer__dtype="bfloat16", engine__zero_stage=0), 1, "engine.zero_stage must be 1, 2 or 3"),
        (changed(engine__zero_stage=4), 1, "engine.zero_stage must be one of 0, 1, 2, 3; got 4"),
        (changed(engine__offload="disk"), 1, "engine.offload must be one of none, optimizer, all; got 'disk'"),
        (
            changed(engine__offload="optimizer", engine__zero_stage=0),
            1,
            "engine.zero_stage must be 1, 2 or 3 with engine.offload=optimizer; got 0. Use engine.zero_stage=1",
        ),
        (changed(engine__offload="all"), 1, "engine.zero_stage must be 3 with engine.offload=all; got 1"),
        (changed(engine__hierarchical=2), 4, "engine.hierarchical must be null without engine.zero_stage=3"),
        (
            changed(engine__hierarchical=3, engine__zero_stage=3),
            4,
            "engine.hierarchical must divide the 4 ranks into groups of two or more; got 3",
        ),
        (changed(engine__hierarchical=4, engine__zero_stage=3), 4, "engine.hierarchical must divide .* got 4"),
        (changed(trainer__tile_tokens=0), 1, "trainer.tile_tokens must be at least 1; got 0"),
        (
            changed(trainer__tile_tokens=64, trainer__compile=True),
            1,
            "trainer.tile_tokens must be null with trainer.compile, .* got 64",
        ),
        (
            changed(trainer__activation_checkpointing={"softmax": "some"}),
            1,
            "trainer.activation_checkpointing must be one of none, full, mixing for each mixer; got 'some' for softmax",
        ),
        (changed(engine__config={"fp16": {}}), 1, "engine.config.fp16 must not be given; got .* Use trainer.dtype"),
        (changed(data__sequence_length=0), 1, "data.sequence_length must be at least 2; got 0"),
        (changed(trainer__seed=-1), 1, "trainer.seed must lie within 0..2.64-1; got -1"),
        (changed(trainer__steps=0), 1, "trainer.steps must be at least 1; got 0"),
        (changed(trainer__activation_checkpointing="some"), 1, "trainer.activation_checkpointing must be one of"),
        (changed(optimizer=OptimizerSettings(betas=(0.9, 1.0))), 1, "optimizer.betas must be two numbers"),
        (
            changed(kernels__delta_rule="fla"),
            1,
            "kernels.delta_rule must be one of auto, triton, chunked, reference, library; got 'fla'",
        ),
        (
            changed(kernels__selective_scan="library"),
            1,
            "kernels.selective_scan must be one of .*reference; got",
        ),
        (
            changed(kernels__swiglu="reference"),
            1,
            "kernels.swiglu must be one of auto, triton, chunked, library; got",
        ),
        (changed(init_from="/nowhere"), 1, "init_from must be a folder .* got /nowhere"),
        (changed(evaluation__rows=0), 1, "evaluation.rows must be at least 1; got 0"),
        (
            changed(data__source="recall", evaluation__prompt="def "),
            1,
            "evaluation.prompt must be left out .* got 'def '",
        ),
        (changed(checkpoint__keep=0), 1, "checkpoint.keep must be at least 1; got 0"),
        (changed(logger__every=0), 1, "logger.every must be at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: Settings, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(settings, world)


def test_offloading_activations_is_refused_on_a_cpu() -> None:
    chosen = changed(trainer__activation_checkpointing="full", trainer__offload_activations=True)
    check(chosen, 1, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"trainer.offload_activations must be false on cpu, .* got true"):
        check(chosen, 1, torch.device("cpu"))


def test_deepspeeds_meter_of_throughput_is_off_unless_it_is_asked_for() -> None:
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert configuration(EngineSettings(), "float32", 1.0, 1)["timers"] == {"throughput": {"enabled": False}}
    assert configuration(EngineSettings(config=asked), "float32", 1.0, 1)["timers"] == asked["timers"]


def test_layout_and_micro_batches_follow() -> None:
    settings = changed(
        parallel__sequence=2, parallel__layout="zigzag", data__rows_per_step=12, data__rows_per_micro_batch=2
    )
    check(settings, 6)
    layout = layout_of(settings.parallel, settings.data.sequence_length)
    assert (layout.ranks, layout.spans) == (2, 2)
    assert settings.data.micro_batches(3) == 2
