"""Runs through stages: what comes after a border is what a run started by hand from its checkpoint gives."""

import argparse
import dataclasses
import gc
import json
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from test_trainer import EXACT, MIXERS, StopAfter, exact, lines
from test_trainer import settings as small_settings

from longreach.launch.build import build
from longreach.parallel.mesh import Mesh
from longreach.trainer.callback import Callback
from longreach.trainer.checkpoint import checkpoint
from longreach.trainer.data.corpus import open_corpus
from longreach.trainer.schedule import schedule_in
from longreach.trainer.settings import Settings
from longreach.trainer.stages.plan import plan_of
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs on several ranks

LONG = {"steps": 3, "name": "long", "data.sequence_length": 192, "data.rows_per_step": 2}
QUIET = {
    "evaluation__sample_tokens": 0,
    "evaluation__at_start": False,
    "evaluation__positions": True,
    "checkpoint__asynchronous": False,
}
# What changes what is computed, and what changes only where it is kept.
OPTIMIZER = {"optimizer.qk_clip": 0.05, "optimizer.betas": [0.8, 0.9]}
MEMORY = {"trainer.tile_tokens": 40, "trainer.activation_checkpointing": {"softmax": "full"}}
STAGES = ({"steps": 4}, LONG | {"model.mixers.softmax.rope_base": 1e6} | OPTIMIZER | MEMORY)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for source in sorted(Path(argparse.__file__).parent.glob("[a-c]*.py")):
        if source.stat().st_size < 20_000:
            shutil.copy(source, folder / f"{source.stem}.txt")
    return folder


def settings(texts: Path, run: Path, *stages: dict[str, Any], **changes: Any) -> Settings:
    made = small_settings(texts, run, **(QUIET | changes))
    made.stages = list(stages)
    return made


class StopAtBorder(Callback):
    """A planned failure when the next stage has been made and validated."""

    def next_stage(self, trainer: Trainer) -> None:
        raise KeyboardInterrupt


class Watch(Callback):
    """What of a stage is still in memory when the next one has begun."""

    def __init__(self) -> None:
        self.modules: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def start(self, trainer: Trainer) -> None:
        self.modules.append(weakref.ref(trainer.engine.module))

    def next_stage(self, trainer: Trainer) -> None:
        self.alive.append(sum(module() is not None for module in self.modules))
        self.start(trainer)


def train(rank: int, world: int, chosen: Settings, stop: Callback | None = None) -> tuple[int, list[int]]:
    """Runs a trainer on this rank; its first step, and how many old models were alive at each border."""
    watch = Watch()
    callbacks = {"watch": watch} | ({} if stop is None else {"stop": stop})
    mesh = Mesh.create(plan_of(chosen).stages[0].settings.parallel.sequence)
    trainer = Trainer(chosen, build, mesh, torch.device("cpu"), ["train"], callbacks)
    first = trainer.step
    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        trainer.run()
    del trainer
    gc.collect()
    return first, watch.alive


@pytest.fixture(scope="module")
def uninterrupted(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("staged") / "run"
    assert run_ranks(1, train, settings(texts, run, *STAGES)) == [(0, [0])]  # one model at a time
    return run


def close(run: Path, other: Path, after: int = 0) -> None:
    """The numbers of two runs agree to rounding, from the steps behind `after` on."""
    got, expected = ([line for line in lines(each) if line["step"] > after] for each in (run, other))
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for line, reference in zip(got, expected, strict=True):
        for key in (*EXACT, *buckets(reference, "loss"), *buckets(reference, "targets")):
            if key in reference:
                assert line[key] == pytest.approx(reference[key], rel=1e-4), (line["step"], key)


def buckets(line: dict[str, Any], measure: str) -> list[str]:
    """What a line says of each bucket of positions, by name."""
    return [key for key in line if key.startswith(f"validation_{measure}_at_")]


def test_steps_are_numbered_on_and_a_border_is_validated_on_both_sides(uninterrupted: Path) -> None:
    records = lines(uninterrupted)
    training = [line for line in records if "loss" in line]
    assert [(line["step"], line["stage"]) for line in training] == [(n, "1" if n < 5 else "long") for n in range(1, 8)]
    assert [line["tokens"] for line in training] == [384 * step for step in range(1, 8)]
    validation = [
        (line["step"], line["stage"], "before_stage" in line) for line in records if "validation_loss" in line
    ]
    assert validation == [(4, "1", False), (4, "long", True), (7, "long", False)]
    before, after = [line["validation_loss"] for line in records if "validation_loss" in line][:2]
    assert before != after
    saved = checkpoint.verify(uninterrupted / "checkpoints" / "step-00000004").state
    assert schedule_in(saved) == plan_of(settings(uninterrupted, uninterrupted, *STAGES)).stages[0].schedule


def test_the_loss_by_position_goes_up_to_the_length_of_each_stage(uninterrupted: Path) -> None:
    validation = [line for line in lines(uninterrupted) if "validation_loss" in line]
    ends = [max(int(key.rpartition("_")[2]) for key in buckets(line, "loss")) for line in validation]
    assert ends == [127, 255, 255]  # rows of 96 tokens, and of 192 on both sides of the border
    for line in validation:
        losses = [line[key] for key in buckets(line, "loss")]
        targets = [line[key] for key in buckets(line, "targets")]
        mean = sum(loss * number for loss, number in zip(losses, targets, strict=True)) / sum(targets)
        assert mean == pytest.approx(line["validation_loss"], rel=1e-6)


def test_no_token_is_read_twice_or_passed_over(texts: Path, uninterrupted: Path) -> None:
    """The rows that the stages read, told by the streams, are the beginning of the epoch, whole."""
    plan = plan_of(settings(texts, uninterrupted, *STAGES))
    read: list[tuple[int, ...]] = []
    state = None
    for stage in plan.stages:
        corpus = open_corpus(stage.settings.data, seed=stage.settings.trainer.seed)
        stream, rows = corpus.train, stage.rows or 0
        stream.begin(rows) if state is None else stream.follow(state, rows)
        for number in range(rows):
            row, at = stream.row(number), 0
            for length in row.lengths:
                read.append(tuple(row.tokens[at : at + length].tolist()))
                at += length
        state = stream.state(rows)
    whole = open_corpus(plan.stages[0].settings.data, seed=0).train
    whole.length = sum(map(len, read))
    whole.begin(1)  # row 0 is the first of the epoch
    expected = whole.row(0)
    assert sorted(token for piece in read for token in piece) == sorted(expected.tokens.tolist())
    text = " ".join(map(str, expected.tokens.tolist()))
    assert all(" ".join(map(str, piece)) in text for piece in read)
    assert len({piece for piece in read if len(piece) > 60}) == sum(len(piece) > 60 for piece in read)


def test_a_stage_equals_a_run_started_by_hand(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """From the border's checkpoint, told of the change as if it were its own: no stages, the same numbers."""
    by_hand = Path(shutil.copytree(uninterrupted / "checkpoints" / "step-00000004", tmp_path / "step-00000004"))
    chosen = settings(texts, tmp_path / "run", trainer__steps=7, checkpoint__resume=str(by_hand))
    chosen.data.sequence_length, chosen.data.rows_per_step = 192, 2
    chosen.optimizer = dataclasses.replace(chosen.optimizer, qk_clip=0.05, betas=(0.8, 0.9))
    chosen.model["mixers"] = chosen.model["mixers"] | {
        "softmax": chosen.model["mixers"]["softmax"] | {"rope_base": 1e6}
    }
    index = json.loads((by_hand / "index.json").read_text())
    del index["crc32"]
    stream = open_corpus(chosen.data, seed=0).train
    stream.follow(index["state"]["data"], 6)
    index["state"] |= {"data": stream.state(0), "stage": {"name": "", "first": 0}}
    index["state"]["model"]["mixers"]["softmax"]["rope_base"] = 1e6
    (by_hand / "index.json").write_text(json.dumps(index))
    run_ranks(1, train, chosen)
    close(tmp_path / "run", uninterrupted, after=4)
    largest = [line.get("qk_largest_logit") for line in lines(uninterrupted) if "loss" in line]
    assert largest[:4] == [None] * 4
    assert max(largest[5:]) < largest[4]  # of the weights that no bound had held


@pytest.mark.parametrize(("stop", "first"), [(StopAfter(4), 4), (StopAtBorder(), 4), (StopAfter(6), 6)])
def test_a_run_goes_on_where_it_ended(
    texts: Path, uninterrupted: Path, tmp_path: Path, stop: Callback, first: int
) -> None:
    """Before and behind the making of a stage, and in the middle of one: bit by bit, and no line twice."""
    chosen = settings(texts, tmp_path / "run", *STAGES)
    run_ranks(1, train, chosen, stop)
    ((began, _),) = run_ranks(1, train, chosen)
    assert began == first
    assert exact(tmp_path / "run") == exact(uninterrupted)


def test_another_number_of_ranks_goes_on_to_rounding(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """From the border on two ranks that share rows, and stage 3; the end of that on one rank, with one more stage."""
    border = uninterrupted / "checkpoints" / "step-00000004"
    chosen = settings(texts, tmp_path / "run", *STAGES, checkpoint__resume=str(border), engine__zero_stage=3)
    chosen.stages[1] = STAGES[1] | {"parallel.sequence": 2, "parallel.layout": "zigzag"}
    run_ranks(2, train, chosen)
    close(tmp_path / "run", uninterrupted, after=4)
    more = {"steps": 1, "name": "more", "data.sequence_length": 384, "data.rows_per_step": 1}
    chosen = settings(texts, tmp_path / "run", *STAGES, more)
    run_ranks(1, train, chosen)
    assert [line["stage"] for line in lines(tmp_path / "run") if line["step"] == 8] == ["more", "more"]


def test_ranks_are_arranged_anew_within_a_run(texts: Path, tmp_path: Path) -> None:
    """Two ranks, first with rows of their own and then sharing each; softmax attention becomes MoBA."""
    moba = {"_target_": f"{MIXERS}.sparse.block_sparse_attention.MoBA", "_partial_": True, "heads": 2}
    sparse = LONG | {"model.mixers.softmax": moba | {"block_size": 16, "top_k": 2}}
    sparse |= {"trainer.activation_checkpointing": "full", "schedule.warmup_steps": 1}
    shared = sparse | {"parallel.sequence": 2, "engine.zero_stage": 2}
    one = settings(texts, tmp_path / "one", {"steps": 2}, sparse)
    two = settings(texts, tmp_path / "two", {"steps": 2}, shared)
    run_ranks(1, train, one)
    assert run_ranks(2, train, two) == 2 * [(0, [0])]
    close(tmp_path / "two", tmp_path / "one")
    rates = [line["learning_rate"] for line in lines(tmp_path / "two") if "loss" in line]
    assert np.argmax(rates[2:]) == 0  # warmed up anew, in one step


def test_other_data_are_read_in_the_tokens_of_the_run(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("another text " * 99)
    (tmp_path / "other" / "b.txt").write_text("and one more " * 99)
    chosen = settings(texts, tmp_path / "run", {"steps": 2}, {"steps": 2, "data.path": str(tmp_path / "other")})
    chosen.data.tokenizer, chosen.data.vocabulary_size, chosen.data.validation_fraction = "bpe", 300, 0.5
    run_ranks(1, train, chosen)
    first, last = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    tokenizers = [(path / "tokenizer" / "tokenizer.json").read_text() for path in (first, last)]
    assert tokenizers[0] == tokenizers[1]
    assert (
        len({json.loads((path / "index.json").read_text())["state"]["data"]["fingerprint"] for path in (first, last)})
        == 2
    )


def refuse(rank: int, world: int, chosen: Settings) -> str:
    with pytest.raises(ValueError, match="stages") as error:
        train(rank, world, chosen)
    return str(error.value)


def test_every_stage_is_refused_before_the_first_step(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    changes = {
        "model must keep its parameters": {"model.depth": 4},
        "heads must divide width=32; got 5": {"model.mixers.softmax.heads": 5},
        "data.path must be": {"data.path": str(tmp_path / "no")},
    }
    bad = [
        *((settings(texts, tmp_path / "run", {"steps": 2}, LONG | change), told) for told, change in changes.items()),
        (settings(texts, uninterrupted, {"steps": 2}, *STAGES), "must keep those that have begun"),
    ]
    for chosen, message in bad:
        first, second = run_ranks(2, refuse, chosen)
        assert message in first
        assert first.startswith("stages")
        assert first == second
    assert not (tmp_path / "run").exists()


def test_a_border_that_cannot_be_saved_ends_the_run(texts: Path, tmp_path: Path) -> None:
    (message,) = run_ranks(1, train_on_a_full_disk, settings(texts, tmp_path / "run", *STAGES))
    assert message.startswith("stages[1] (long) must begin from a checkpoint; checkpoint")
    assert "No space left on device" in message
    assert lines(tmp_path / "run")[-1]["step"] == 4


def train_on_a_full_disk(rank: int, world: int, chosen: Settings) -> str:
    real = checkpoint.TensorWriter

    class Full(real):  # type: ignore[misc, valid-type]
        def write(self, name: str, piece: torch.Tensor) -> None:
            if "step-00000004" in str(self.path):
                raise OSError(28, "No space left on device")
            super().write(name, piece)

    checkpoint.TensorWriter = Full  # type: ignore[misc]
    try:
        with pytest.raises(RuntimeError) as failed:
            train(rank, world, chosen)
    finally:
        checkpoint.TensorWriter = real  # type: ignore[misc]
    return str(failed.value)
