"""Steps whose numbers are read together: a line for each, read before anybody looks, and faults at their own step."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.trainer import trainer as trainer_module
from longreach.trainer.callback import Callback
from longreach.trainer.data.packing import TokenStream
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.run import failure
from longreach.trainer.run.directory import RunDirectory
from longreach.trainer.run.outputs import Outputs
from longreach.trainer.run.records import Records
from longreach.trainer.run.settings import LoggerSettings, WandbSettings
from longreach.trainer.schedule import Schedule
from longreach.trainer.settings import Settings, TrainerSettings
from longreach.trainer.stages.plan import plan_of
from longreach.trainer.trainer import Trainer


class Documents:
    lengths = np.array([16] * 4)

    def __getitem__(self, document: int) -> np.ndarray:
        return np.arange(16)


class Model:
    """What the loop asks of a model."""

    losses: dict[str, float] = {}

    def at_step(self, step: int) -> None: ...
    def update(self, sums: dict[str, Tensor]) -> None: ...
    def statistics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def flops(self, documents: object) -> int:
        return 100

    def parameter_count(self, *, active: bool = False) -> int:
        return 1


class Engine:
    """Gives each step the loss and norm of a script; a norm that is not finite steps nothing."""

    def __init__(self, script: list[tuple[float, float]]) -> None:
        self.module, self.script, self.steps, self.stepped = Model(), script, 0, False

    def __call__(self, tokens: Tensor, *rest: object) -> tuple[Tensor, None, dict[str, Tensor]]:
        return torch.tensor(self.script[self.steps][0] * 15), None, {}

    def backward(self, *rest: object) -> None: ...

    def step(self, rate: float, factors: dict[Any, Tensor] | None = None) -> Tensor:
        norm = self.script[self.steps][1]
        self.steps, self.stepped = self.steps + 1, math.isfinite(norm)
        return torch.tensor(norm)


def trainer(run: Path, script: list[tuple[float, float]], every: int, callback: Callback | None = None) -> Trainer:
    """A run of a step for each (loss, norm) of the script."""
    made: Any = Trainer.__new__(Trainer)
    made.settings = Settings(
        data=DataSettings(sequence_length=16, rows_per_step=1),
        trainer=TrainerSettings(steps=len(script), max_skipped_steps=3),
        logger=LoggerSettings(every=every, wandb=WandbSettings(mode="disabled")),
    )
    made.mesh, made.device, made.command, made.layout = Mesh(), torch.device("cpu"), [], Layout(16)
    made.plan = plan_of(made.settings)
    made.stage, made.schedule = made.plan.stages[0], Schedule(made.settings.schedule, 0.1, len(script))
    stream = TokenStream(Documents(), np.arange(4), length=16, seed=0)
    made.shape, made.engine, made.corpus = Model(), Engine(script), SimpleNamespace(train=stream)
    made.step = made.tokens = made.row = 0
    made._begin(stream, None)
    made.directory = RunDirectory(run)
    made.outputs = Outputs(made.settings, made.directory, first=True, step=0, bring_up=made._read_records)
    made.saving = SimpleNamespace(saved=None, unsaved="", wait=lambda trainer: None, settle=lambda patient: None)
    made.sampling = SimpleNamespace(text="")
    made.callbacks = {} if callback is None else {"callbacks.mine": callback}
    return made


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def script(steps: int, changes: dict[int, tuple[float, float]] | None = None) -> list[tuple[float, float]]:
    """Losses 4, 2, 4/3, … of steps 1, 2, 3, … but for the changes, by step."""
    return [(changes or {}).get(step, (4.0 / step, 1.0 / step)) for step in range(1, steps + 1)]


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure._State, "ending", False)
    monkeypatch.setattr(failure._State, "asked", 0)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps that were read at once."""
    seen, original = [], Records.read

    def read(self: Records) -> list[dict[str, Any]]:
        made = original(self)
        if made:
            seen.append([line["step"] for line in made])
        return made

    monkeypatch.setattr(Records, "read", read)
    return seen


@pytest.mark.parametrize(
    ("every", "together"),
    [(1, [[1], [2], [3], [4], [5], [6], [7]]), (3, [[1], [2, 3], [4, 5, 6], [7]]), (10, [[1], [2, 3, 4, 5, 6, 7]])],
)
def test_the_loss_curve_is_whole_however_seldom_the_device_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, together: list[list[int]]
) -> None:
    seen = reads(monkeypatch)
    trainer(tmp_path, script(7), every).run()
    assert seen == together
    assert [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines(tmp_path)] == [
        (step, pytest.approx(4.0 / step), pytest.approx(1.0 / step), 16 * step) for step in range(1, 8)
    ]


class Looks(Callback):
    """Looks at the record of some steps, and logs lines of its own after others."""

    def __init__(self, looks: tuple[int, ...] = (), logs: tuple[int, ...] = (), every: int = 0) -> None:
        self.looks, self.logs, self.every, self.seen = looks, logs, every, []

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step in self.looks or trainer.due(self.every):
            self.seen.append((trainer.record["step"], trainer.record["loss"]))
        if trainer.step in self.logs:
            trainer.outputs.log({"step": trainer.step, "mine": 1})


def test_a_callback_sees_the_last_step_whenever_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, looks = reads(monkeypatch), Looks((4,), every=6)
    trainer(tmp_path, script(12), 100, looks).run()
    assert looks.seen == [(step, pytest.approx(4.0 / step)) for step in (4, 6, 12)]
    assert seen == [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]


def test_lines_of_callbacks_stand_behind_those_of_the_steps_before_them(tmp_path: Path) -> None:
    trainer(tmp_path, script(8), 100, Looks(logs=(3, 7))).run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 7, 7, 8]  # W&B takes no earlier step


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_loss_that_is_not_finite_is_told_at_its_own_step_and_nothing_after_it_is_kept(
    tmp_path: Path, every: int
) -> None:
    run = trainer(tmp_path, script(12, {6: (math.nan, 1.0)}), every)
    with pytest.raises(failure.NotFinite, match="the loss must be finite; got nan at step 6"):
        run.run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_whatever_is_due_is_not_done_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    saves = Looks(every=8)
    with pytest.raises(failure.NotFinite, match="at step 6"):
        trainer(tmp_path, script(12, {6: (math.inf, 1.0)}), 100, saves).run()
    assert saves.seen == []


@pytest.mark.parametrize("every", [1, 100])
def test_skipped_steps_are_told_at_once_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    bad = dict.fromkeys((2, 3, 5, 8, 9, 10), (1.0, math.inf))
    run = trainer(tmp_path, script(12, bad), every)
    with pytest.raises(failure.NotFinite, match=r"the gradient must be finite; got 3 step\(s\) in a row, 8 to 10"):
        run.run()
    said = capsys.readouterr().out
    for step in (2, 3, 5, 8, 9):
        assert said.count(f"step {step}: the gradient is not finite; the weights stay as they are") == 1
    norms = {line["step"]: line["grad_norm"] for line in lines(tmp_path)}
    assert [step for step, norm in norms.items() if norm is None] == [2, 3, 5, 8, 9, 10]
    assert len(norms) == 10


class Fails(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == 7:
            raise RuntimeError("out of luck")


def test_steps_before_a_failure_have_their_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, script(12), 100, Fails()).run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


class Asks(Callback):
    """A signal that arrives while a step is taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step + 1 == self.step:
            failure._State.asked = 10  # SIGUSR1


def test_a_signal_ends_the_run_after_the_step_that_it_arrives_in(tmp_path: Path) -> None:
    run = trainer(tmp_path, script(12), 100, Asks(5))
    run.run()
    assert run.step == 5
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


class NothingIsRead(TorchDispatchMode):
    """Fails where the host asks for a value of a tensor: on a GPU it would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value is read")
        return func(*args, **(kwargs or {}))


def test_steps_between_two_readings_read_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, script(6), 3)
    parts = run.reader.steps(range(6), 0)
    run._train_step(run._meet(parts))  # the first is read
    for _ in (2, 3):
        part = run._meet(parts)
        with NothingIsRead(), pytest.raises(AssertionError) if run.step == 2 else nullcontext():
            run._train_step(part)


def test_one_exchange_between_the_hosts_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges, original = [], trainer_module.gather_numbers

    def gather_numbers(numbers: list[float], mesh: Mesh) -> Tensor:
        exchanges.append(len(numbers))
        return original(numbers, mesh)

    monkeypatch.setattr(trainer_module, "gather_numbers", gather_numbers)
    trainer(tmp_path, script(6), 2).run()
    assert len(exchanges) == 6 + 1  # and one at the end of the run


def test_rows_that_cannot_be_read_end_the_run_in_the_step_that_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TokenStream.row

    def row(self: TokenStream, number: int) -> Any:
        if number == 4:
            raise OSError(5, "Input/output error")
        return original(self, number)

    monkeypatch.setattr(TokenStream, "row", row)
    run = trainer(tmp_path, script(9), 1)
    with pytest.raises(OSError, match="Input/output error"):
        run.run()
    assert run.step == 4
    assert "this was in step 5" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_interval_is_checked_and_depends_on_the_device() -> None:
    assert (LoggerSettings().interval("cpu"), LoggerSettings().interval("cuda")) == (1, 10)
    assert LoggerSettings(every=3).interval("cuda") == 3
    with pytest.raises(ValueError, match=r"logger\.every must be at least 1; got 0"):
        LoggerSettings(every=0).check()
