"""python -m longreach.launch.doctor: the configuration of training, a table and an exit code."""

import os
import re
import subprocess
import sys

import hydra
import pytest

from longreach.launch import doctor
from longreach.launch.train import to_settings
from longreach.trainer.settings import Settings


def compose(name, *overrides):
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return hydra.compose(name, list(overrides))


def test_it_has_the_settings_of_training_and_its_own() -> None:
    overrides = ("model=mamba2_hybrid_tiny", "parallel.sequence=4", "trainer.dtype=bfloat16")
    trained, examined = (to_settings(compose(name, *overrides), [], {}) for name in ("train", "doctor"))
    assert isinstance(examined, Settings)
    assert vars(examined).pop("doctor") == doctor.DoctorSettings()
    assert vars(examined) == vars(trained)


def test_every_stage_that_differs_is_examined(monkeypatch, capsys) -> None:
    """And what one of them cannot be is told before the first is."""
    examined = []

    def note(settings: Settings, *_: object) -> bool:
        examined.append(settings)
        return len(examined) < 2

    monkeypatch.setattr(doctor, "_passes", note)
    zigzag = "{steps: 1, parallel.sequence: 2, parallel.layout: zigzag}"
    for more in ("{steps: 1, data.sequence_length: 64}", "{steps: 1, data.sequence_length: 62}"):
        stages = f"stages=[{{steps: 1}}, {{steps: 2, optimizer.learning_rate: 1e-4}}, {zigzag}, {more}]"
        settings = to_settings(compose("doctor", "model=llama_tiny", stages), [], {})
        if "62" not in more:
            assert not doctor.examine(settings, doctor.DoctorSettings())
            assert [(each.parallel.layout, each.stages) for each in examined] == [("contiguous", []), ("zigzag", [])]
            said = capsys.readouterr().out
            assert "stages[1] (2): as stages[0] (1), but for rows" in said
            assert "stages[3] (4): as stages[2] (3), but for rows" in said
            continue
        with pytest.raises(ValueError, match=r"^stages\[3\] \(4\): data.sequence_length must be a multiple of 4"):
            doctor.examine(settings, doctor.DoctorSettings())
        assert len(examined) == 2


def run_doctor(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "longreach.launch.doctor", *overrides]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.slow
def test_it_prints_a_table_and_a_verdict() -> None:
    result = run_doctor("model=minimax_01_tiny", "parallel.sequence=2", "parallel.layout=zigzag")
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = re.findall(r"^PASS  ops in float64:[^\n]*(?:\n {6,}[^\n]*)*", result.stdout, flags=re.MULTILINE)
    assert {"gated_linear_attention", "softmax_attention"} <= set(re.findall(r"\w+", line))
    assert result.stdout.splitlines()[-1].startswith("PASS: ")


@pytest.mark.slow
def test_a_model_that_cannot_be_is_one_error() -> None:
    result = run_doctor("model=llama_tiny", "model.mixers.softmax.heads=7")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: model.mixers.softmax (SoftmaxAttention): heads must divide width=256; got 7"
    )
