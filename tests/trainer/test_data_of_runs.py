"""Runs on mixtures, with an audit and with new data: what they log, and that nothing repeats or vanishes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from test_callback import MODEL

from longreach.launch.build import build
from longreach.parallel.mesh import Mesh
from longreach.trainer.callback import Callback
from longreach.trainer.checkpoint.settings import CheckpointSettings
from longreach.trainer.data.audit.proof import prove
from longreach.trainer.data.settings import DataSettings, MixtureSource
from longreach.trainer.engine import EngineSettings, OptimizerSettings
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.run.settings import LoggerSettings, RunSettings, WandbSettings
from longreach.trainer.schedule import ScheduleSettings
from longreach.trainer.settings import Settings, TrainerSettings
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, word in (("code", "return self "), ("books", "once upon a time "), ("more", "and then ")):
        made[name] = tmp_path / name
        made[name].mkdir()
        for number in range(12):
            (made[name] / f"{number:02}.txt").write_text(f"{name} {number} " + word * (1 + number))
    return made


def mixed(folders: dict[str, Path], run: Path, **changes: Any) -> Settings:
    """A run on a mixture of some 1,700 tokens; every source comes round several times."""
    mixture = {
        "code": MixtureSource(0.75, path=str(folders["code"])),
        "books": MixtureSource(0.25, path=str(folders["books"])),
    }
    data = DataSettings(
        mixture=mixture,
        tokenizer="bytes",
        sequence_length=64,
        rows_per_step=8,
        validation_fraction=0.2,
        audit=True,
        cache_dir=str(run.parent / "cache"),
    )
    return Settings(
        model=dict(MODEL),
        data=dataclasses.replace(data, **changes),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        schedule=ScheduleSettings("wsd", warmup_steps=2),
        trainer=TrainerSettings(steps=10),
        engine=EngineSettings(zero_stage=1),
        evaluation=EvaluationSettings(every=5, rows=4, sample_tokens=4, positions=True),
        checkpoint=CheckpointSettings(every=2, keep=10),
        logger=LoggerSettings(wandb=WandbSettings(mode="disabled")),
        run=RunSettings(dir=str(run)),
    )


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt


def train(rank: int, world: int, chosen: Settings, stop_after: int = 0) -> int:
    callbacks: dict[str, Callback] = {"stop": StopAfter(stop_after)} if stop_after else {}
    trainer = Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"], callbacks)
    first = trainer.step
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert stop_after
    return first


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if key in record]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mixed_run_that_is_resumed_on_other_ranks_reads_everything_once(
    folders: dict[str, Path], tmp_path: Path, packing: str
) -> None:
    chosen = mixed(folders, tmp_path / "run", packing=packing)
    run_ranks(2, train, chosen, 5)  # beyond the newest checkpoint, at 4
    (resumed,) = run_ranks(1, train, chosen)
    assert 0 < resumed < 5
    proof = prove(tmp_path / "run")
    assert proof.holds, proof.table()
    found = {finding.source.name: finding for finding in proof.findings}
    assert found.keys() == {"code", "books"}
    assert found["code"].epochs >= 2
    training = lines(tmp_path / "run", "loss")
    for step, line in enumerate(training, 1):
        assert (line["source_code_rows"], line["source_books_rows"]) == (6 * step, 2 * step)
        assert line["source_code_tokens"] + line["source_books_tokens"] == line["tokens"]
        assert min(line["source_code_loss"], line["source_books_loss"]) <= line["loss"]
        assert max(line["source_code_loss"], line["source_books_loss"]) >= line["loss"]
    assert training[-1]["source_code_tokens"] == found["code"].tokens
    assert training[-1]["source_books_epochs"] == pytest.approx(
        found["books"].tokens / found["books"].source.lengths.sum()
    )
    assert (training[-1]["padding"] > 0) == (packing == "best_fit")
    (*_, validation) = lines(tmp_path / "run", "validation_loss")
    of_sources = [validation["validation_loss_code"], validation["validation_loss_books"]]
    assert min(of_sources) <= validation["validation_loss"] <= max(of_sources)
    targets = {key: value for key, value in validation.items() if key.startswith("validation_targets_at_")}
    of_buckets = [value * validation[key.replace("targets", "loss")] for key, value in targets.items()]
    assert sum(of_buckets) / sum(targets.values()) == pytest.approx(validation["validation_loss"], rel=1e-6)


def test_rows_that_are_computed_together_have_one_loss(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where micro-batches hold rows of several sources, only those of a source alone tell of it."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_ranks(1, train, mixed(folders, alone), 2)
    run_ranks(1, train, mixed(folders, together, rows_per_micro_batch=8), 2)
    for line, other in zip(lines(alone, "loss"), lines(together, "loss"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["source_code_rows"] == other["source_code_rows"]
        assert "source_code_loss" in line
        assert "source_code_loss" not in other


def test_new_data_are_given_on_purpose(folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(1, train, mixed(folders, run), 4)
    new = {"code": MixtureSource(0.5, path=str(folders["code"])), "more": MixtureSource(0.5, path=str(folders["more"]))}
    refusals = run_ranks(1, refused, mixed(folders, run, mixture=new))
    assert "data.restart=true" in refusals[0]
    again = mixed(folders, run, mixture=new, restart=True)
    (first,) = run_ranks(1, train, again, 7)
    (resumed,) = run_ranks(1, train, again)
    assert first < resumed  # the same command goes on, and does not begin once more
    proof = prove(run)
    assert proof.holds, proof.table()
    assert {finding.source.name for finding in proof.findings} == {"code", "books", "more"}
    assert lines(run, "loss")[-1]["source_code_rows"] == first * 6 + (10 - first) * 4  # of code nothing is read again
    fresh = mixed(folders, tmp_path / "fresh", restart=True)
    assert "data.restart must be left out" in run_ranks(1, refused, fresh)[0]


def test_a_source_that_a_stage_drops_is_read_on_by_a_later_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """From where it was, whatever the rows are by then; of each source the epoch that is not over is proved."""
    chosen = mixed(folders, tmp_path / "run")
    chosen.evaluation = EvaluationSettings(every=0, sample_tokens=0)
    code, books, more = ({"path": str(folders[name]), "weight": 0.75} for name in ("code", "books", "more"))
    chosen.stages = [
        {"steps": 2},
        {"steps": 2, "data.mixture": {"books": None, "more": more}, "data.sequence_length": 96},
        {"steps": 2, "data.mixture": None, "data.source": "text", "data.path": str(folders["more"])},
        {"steps": 2, "data": {"source": "mixture", "path": None, "mixture": {"code": code, "books": books}}},
    ]
    run_ranks(1, train, chosen, 3)
    run_ranks(1, train, chosen)
    proof = prove(tmp_path / "run")
    assert proof.holds, proof.table()
    assert proof.goes_on == proof.steps == 8
    assert {finding.source.name for finding in proof.findings} == {"code", "books", "more"}
    assert [finding.left for finding in proof.findings] == [-f.tokens % f.source.lengths.sum() for f in proof.findings]
    training = lines(tmp_path / "run", "loss")
    assert [line["source_code_rows"] for line in training if "source_code_rows" in line] == [6, 12, 16, 20, 24, 28]
    assert [line["source_books_rows"] for line in training if "source_books_rows" in line] == [2, 4, 8, 12]


def refused(rank: int, world: int, chosen: Settings) -> str:
    with pytest.raises(ValueError, match="must") as raised:
        train(rank, world, chosen)
    return str(raised.value)


def test_an_audit_begins_with_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(1, train, mixed(folders, tmp_path / "run", audit=False), 4)
    assert "data.audit must be on" in run_ranks(1, refused, mixed(folders, tmp_path / "run"))[0]


class _Losing(Trainer):
    """Reads a row less than it counts, from step 3 on."""

    def _train_step(self, part: Any) -> None:
        if self.step == 2:
            self.row += 1
        super()._train_step(part)


def lose(rank: int, world: int, chosen: Settings, kind: Callable[..., Trainer]) -> None:
    kind(chosen, build, Mesh.create(1), torch.device("cpu"), ["train"], {}).run()


def test_rows_that_the_loop_loses_are_found(folders: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(1, lose, mixed(folders, tmp_path / "run"), _Losing)
    proof = prove(tmp_path / "run")
    assert not proof.holds
