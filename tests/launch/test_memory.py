"""python -m longreach.launch.memory: the settings of training, and an account of a step's memory."""

import hydra
import pytest

from longreach.launch import memory, plan
from longreach.launch.configuration import to_schema
from longreach.launch.train import to_settings


def lines(*overrides, **chosen):
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        config = hydra.compose("memory", ["model=minimax_01_tiny", *overrides])
    return memory.lines(to_settings(config, [], {}), memory.MemorySettings(**chosen))


def test_it_prints_a_line_per_part_and_the_peak():
    told = lines(
        "data.sequence_length=1024", "trainer.activation_checkpointing={softmax: mixing, lightning: full}",
        "trainer.tile_tokens=128", "parallel.sequence=2", "engine.zero_stage=2", ranks=4,
    )  # fmt: skip
    assert told[0] == "512 tokens at once on each of 4 ranks"
    assert told[-1] == "not counted: what kernels and libraries need meanwhile"
    parts = [line.split("  ")[0] for line in told[2:]]
    states = ["parameters", "gradients", "float32 masters", "moments", "DeepSpeed's buffers", "copy for saving (host)"]
    assert parts[:6] == states
    assert {"kept: residual stream and norms", "kept: softmax", "peak of a rank", "on the host"} <= set(parts)


def test_each_stage_has_an_account_of_its_own():
    """That of the run's settings alone would be of rows that no stage has."""
    told = lines("stages=[{steps: 2, data.sequence_length: 512}, {steps: 2, name: long, data.sequence_length: 1024}]")
    heads = [index for index, line in enumerate(told) if line.startswith("stage ")]
    assert [told[index : index + 2] for index in heads] == [
        ["stage 1", "512 tokens at once on each of 1 ranks"],
        ["stage long", "1,024 tokens at once on each of 1 ranks"],
    ]


def test_what_training_refuses_is_refused():
    with pytest.raises(ValueError, match=r"got 'softmx'. Did you mean softmax"):
        lines("trainer.activation_checkpointing={softmx: full}")
    with pytest.raises(ValueError, match=r"memory.device must be one of cuda, cpu; got 'tpu'"):
        lines(device="tpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stages=[{steps: 2}, {steps: 2}]", "checkpoint.every=0"), r"stages\[0\] \(1\): checkpoint.every must be at"),
        (("stages=[{steps: 2}, {steps: 2, model.depth: 8}]",), r"stages\[1\] \(2\): model must keep its parameters"),
        (("stages=[{steps: 2}, {steps: 2, parallel.sequence: 3}]",), r"stages\[1\] \(2\): parallel.sequence must"),
    ],
)
def test_stages_that_training_refuses_are_refused_before_any_is_told(overrides: tuple[str, ...], message: str):
    """By the planner too."""
    with pytest.raises(ValueError, match=message):
        lines("model.depth=16", *overrides)
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        config = hydra.compose("plan", ["model=minimax_01_tiny", "model.depth=16", *overrides])
    settings = to_settings(config, [], {})
    with pytest.raises(ValueError, match=message):
        next(plan.told(settings, to_schema(config, plan.Configuration).cluster, 1e12, 0))
