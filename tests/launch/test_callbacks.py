"""Callbacks of the command line: what is no callback is refused in one line, and one that fails ends every rank."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest

from longreach.launch import train as launched
from longreach.launch.build import build_callbacks
from longreach.launch.train import to_settings

OWN = """
from longreach.trainer.callback import Callback


class Mine(Callback):
    def __init__(self, *, every: int, name: str = "mine"):
        self.every, self.name = every, name

    def after_step(self, trainer):
        if trainer.due(self.every):
            trainer.outputs.say(f"{self.name} after step {trainer.step}")
            if trainer.mesh.rank == 1:
                raise RuntimeError("out of luck")


class Other:
    pass
"""


@pytest.fixture
def own(module_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of callbacks, in which the command is given."""
    (module_folder / "own_callbacks.py").write_text(OWN)
    monkeypatch.chdir(module_folder)
    return module_folder


def composed(*overrides: str) -> Any:
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return to_settings(hydra.compose("train", list(overrides)), list(overrides), {})


def test_the_command_line_adds_callbacks_by_name(own: Path) -> None:
    settings = composed(
        "+callbacks.a._target_=own_callbacks.Mine", "+callbacks.a.every=3",
        "+callbacks.b._target_=own_callbacks.Mine", "+callbacks.b.every=1", "+callbacks.b.name=other",
    )  # fmt: skip
    built = build_callbacks(settings.callbacks)
    assert [(name, made.every, made.name) for name, made in built.items()] == [("a", 3, "mine"), ("b", 1, "other")]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"_target_": "own_callbacks.Mime", "every": 1}, "_target_ must be the dotted path .* Did you mean Mine?"),
        ({"_target_": "own_callback.Mine", "every": 1}, "No module own_callback was found. Did you mean own_callbacks"),
        ({"_target_": "own_callbacks.Other"}, "must be a Callback; got Other. Derive it from longreach"),
        ({"every": 1}, r"callbacks\.mine\._target_ must be the dotted path of a class; got none"),
        ({"_target_": "own_callbacks.Mine"}, r"callbacks\.mine must give every; got nothing"),
        ({"_target_": "own_callbacks.Mine", "often": 1}, r"callbacks\.mine must use settings of Mine; got 'often'"),
        ({"_target_": "own_callbacks.Mine", "every": "x"}, r"callbacks\.mine\.every must be of type int; got 'x'"),
        ({"_target_": "own_callbacks.Mine", "every": 1, "_partial_": True}, "_partial_ must be left out"),
    ],
)  # fmt: skip
def test_what_is_no_callback_is_refused_before_ranks_meet(
    own: Path, monkeypatch: pytest.MonkeyPatch, callback: dict[str, Any], message: str
) -> None:
    def meet(*arguments: object, **options: object) -> None:
        raise AssertionError("the ranks have met")

    monkeypatch.setattr(launched.processes, "start", meet)
    monkeypatch.setattr(launched.failure, "catch_termination", lambda: None)
    settings = composed()
    settings.callbacks = {"mine": callback}
    with pytest.raises(ValueError, match=message) as error:
        launched.train(settings, ["train"])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_callback_that_raises_on_one_rank_ends_all_and_is_shown_once(own: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = (
        "longreach.launch.train data=recall model=llama_tiny model.width=32 model.depth=1 data.vocabulary_size=32 "
        "data.sequence_length=64 data.recall.pairs=4 parallel.sequence=2 logger.wandb.mode=disabled run.dir=run "
        "logger.memory=false trainer.steps=50 checkpoint.every=1 evaluation.every=0 evaluation.sample_tokens=0 "
        "+callbacks.mine._target_=own_callbacks.Mine +callbacks.mine.every=2"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*torchrun, *words.split()], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("out of luck\n") == 2  # at the traceback's end, and in the line that names the callback
    assert "rank 1 failed: callbacks.mine.after_step: RuntimeError: out of luck\n" in done.stderr
    assert "this was after step 2; to resume from step-00000002: torchrun" in done.stderr
    assert done.stdout.count("mine after step 2") == 1
    assert "step 3/" not in done.stdout
