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
