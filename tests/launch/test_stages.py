"""Stages as users write them: on the command line, in a YAML file, in the presets."""

from pathlib import Path

import hydra
import pytest

from longreach.launch.build import build
from longreach.launch.train import to_settings
from longreach.trainer.settings import Settings
from longreach.trainer.stages.opening import check_models
from longreach.trainer.stages.plan import plan_of

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
PRESETS = {path.stem: path for path in (CONF / "experiment").glob("*.yaml") if "\nstages:" in path.read_text()}


def settings(*overrides: str, folder: str | None = None) -> Settings:
    given = ["hydra.searchpath=[file://" + folder + "]"] if folder else []
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return to_settings(hydra.compose("train", [*given, *overrides]), list(overrides), {})


def test_stages_are_written_on_the_command_line() -> None:
    given = settings(
        "stages=[{steps: 100, data.sequence_length: 512}, "
        "{tokens: 1e6, name: long, data.sequence_length: 2048, data.rows_per_step: 2, "
        "model.mixers.softmax.rope_base: 1e6}]"
    )
    first, second = plan_of(given).stages
    assert (first.name, first.stop, second.name, second.stop) == ("1", 100, "long", 345)
    assert second.settings.model["mixers"]["softmax"]["rope_base"] == 1e6
    assert given.trainer.steps == 345


def test_stages_are_written_in_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nstages:\n  - steps: 3\n  - steps: 4\n    data: {rows_per_step: 2}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    first, second = plan_of(settings("experiment=mine", "model=llama_tiny", folder=str(tmp_path))).stages
    assert (first.stop, second.stop, second.settings.data.rows_per_step) == (3, 7, 2)


def test_steps_are_not_given_twice() -> None:
    with pytest.raises(ValueError, match=r"trainer\.steps must be left out with stages"):
        settings("stages=[{steps: 3}]", "trainer.steps=5")


def test_a_stage_too_short_for_its_schedule_is_not_told_to_raise_the_steps_of_the_run() -> None:
    """Which are the sum of the stages' and cannot be given."""
    with pytest.raises(ValueError, match=r"stages\[0\] \(1\): schedule.warmup_steps .* must fit into") as refused:
        plan_of(settings("stages=[{steps: 2}, {steps: 9, schedule.warmup_steps: 1}]", "schedule.warmup_steps=3"))
    assert "trainer.steps" not in str(refused.value)
    assert "the steps of the stages that share a schedule=2" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_can_run(name: str) -> None:
    """Its plan on eight ranks, or on one where it is small, and every stage's model without memory."""
    plan = plan_of(settings(f"experiment={name}"))
    assert len(plan.stages) > 2
    plan.check(8 if name.endswith("131k") else 1)
    check_models(build, plan)
    lengths = [stage.settings.data.sequence_length for stage in plan.stages]
    assert lengths == sorted(lengths)
