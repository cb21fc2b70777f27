"""The loop on small real text: the loss falls, resuming is exact, faults cost nothing that was saved."""

import argparse
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Container
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from distributed import run_ranks

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.launch.train import to_settings
from longreach.models.mixer import Mixer
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.callback import Callback
from longreach.trainer.checkpoint import checkpoint
from longreach.trainer.checkpoint.settings import CheckpointSettings
from longreach.trainer.checkpoint.tensor_files import TensorWriter
from longreach.trainer.data.packing import NO_TARGET
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.engine import EngineSettings, OptimizerSettings
from longreach.trainer.evaluation.evaluation import evaluate, evaluate_truncated
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.ranks.settings import ParallelSettings
from longreach.trainer.run import failure
from longreach.trainer.run.settings import LoggerSettings, RunSettings, WandbSettings
from longreach.trainer.schedule import ScheduleSettings
from longreach.trainer.settings import Settings, TrainerSettings
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs on several ranks

MIXERS = "longreach.models.mixers"
LIGHTNING = f"{MIXERS}.linear.lightning_attention"
MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "width": 32,
    "depth": 2,
    "pattern": ["lightning", "softmax"],
    "mixers": {
        "lightning": {
            "_target_": f"{MIXERS}.linear.lightning_attention.LightningAttention",
            "_partial_": True,
            "heads": 2,
        },
        "softmax": {"_target_": f"{MIXERS}.softmax.softmax_attention.SoftmaxAttention", "_partial_": True, "heads": 2},
    },
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 48},
}
EXACT = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss", "bits_per_byte")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text: the standard library's own sources around argparse, as far as they are short."""
    folder = tmp_path_factory.mktemp("texts")
    library = Path(argparse.__file__).parent
    for source in sorted(library.glob("[a-h]*.py")):
        if source.stat().st_size < 20_000:
            shutil.copy(source, folder / f"{source.stem}.txt")
    return folder


def settings(texts: Path, run: Path, **changes: Any) -> Settings:
    """Small settings; `engine__zero_stage=3` changes one of a group."""
    made = Settings(
        model=dict(MODEL),
        data=DataSettings(
            source="text",
            path=str(texts),
            tokenizer="bytes",
            sequence_length=96,
            rows_per_step=4,
            validation_fraction=0.2,
            cache_dir=str(texts.parent / "cache"),
        ),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        schedule=ScheduleSettings("wsd", warmup_steps=2),
        trainer=TrainerSettings(steps=8),
        parallel=ParallelSettings(),
        engine=EngineSettings(zero_stage=1),
        evaluation=EvaluationSettings(every=4, at_start=True, rows=3, prompt="def ", sample_tokens=8),
        checkpoint=CheckpointSettings(every=2, keep=2),
        logger=LoggerSettings(memory=False, wandb=WandbSettings(mode="disabled")),
        run=RunSettings(dir=str(run)),
    )
    for name, value in changes.items():
        group, key = name.split("__")
        setattr(made, group, dataclasses.replace(getattr(made, group), **{key: value}))
    return made


class StopAfter(Callback):
    """A planned failure after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt


def train(rank: int, world: int, chosen: Settings, stop_after: int | None = None) -> int:
    """Runs a trainer on this rank, up to a planned failure after a step if asked for."""
    callbacks = {} if stop_after is None else {"stop": StopAfter(stop_after)}
    trainer = Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"], callbacks)
    first = trainer.step
    with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
        trainer.run()
    return first


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in lines(run)]


@pytest.fixture(scope="module")
def uninterrupted(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, train, settings(texts, run, parallel__sequence=2))
    return run


def train_with_a_full_log(rank: int, world: int, chosen: Settings) -> list[int]:
    done = []
    with suppress(OSError), open("/dev/full", "w") as full, redirect_stdout(full):
        train(rank, world, chosen)
        done.append(rank)
    return done


def test_a_disk_too_full_for_what_is_printed_ends_no_run(texts: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path / "run", trainer__steps=2, evaluation__every=0, evaluation__sample_tokens=0)
    assert run_ranks(1, train_with_a_full_log, chosen) == [[0]]
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2]


def test_a_run_learns_and_leaves_what_it_should(uninterrupted: Path) -> None:
    records = lines(uninterrupted)
    training = [line for line in records if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert [line["tokens"] for line in training] == [384 * step for step in range(1, 9)]
    assert training[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert training[-1]["loss"] < 0.85 * training[0]["loss"]
    for key in ("grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes", "flops_per_second"):
        assert all(line[key] > 0 for line in training)
    assert all(0 < line["communication_seconds"] < line["seconds"] for line in training)
    assert all(line["attention_imbalance"] >= 1 and line["padding"] == 0 for line in training)
    validation = [line for line in records if "validation_loss" in line]
    assert [line["step"] for line in validation] == [0, 4, 8]
    losses = [line["validation_loss"] for line in validation]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(257), rel=0.05)
    assert [path.name for path in sorted((uninterrupted / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]
    assert (uninterrupted / "plots" / "loss.png").stat().st_size > 1000
    assert "trainer:" in (uninterrupted / "config.yaml").read_text()
    samples = (uninterrupted / "samples.txt").read_text()
    assert samples.startswith("--- step 4\ndef ")
    assert "--- step 8\ndef " in samples


def test_resuming_after_a_failure_is_bitwise(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path / "run", parallel__sequence=2)
    run_ranks(2, train, chosen, 7)
    assert lines(tmp_path / "run")[-1]["step"] == 7  # beyond the newest checkpoint, at 6
    assert run_ranks(2, train, chosen) == [6, 6]
    assert exact(tmp_path / "run") == exact(uninterrupted)


def test_reading_the_device_seldom_changes_no_number(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_ranks(2, train, settings(texts, tmp_path / "run", parallel__sequence=2, logger__every=5))
    assert exact(tmp_path / "run") == exact(uninterrupted)
    # Two runs of one topology: every bit of the weights and moments too, by their checksums.
    first, second = (
        json.loads((run / "checkpoints/step-00000008/index.json").read_text())["files"]
        for run in (uninterrupted, tmp_path / "run")
    )
    assert first == second


@pytest.mark.parametrize(("world", "sequence", "stage"), [(1, 1, 0), (4, 2, 3)])
def test_other_ranks_and_stages_go_on_to_rounding(
    texts: Path, uninterrupted: Path, tmp_path: Path, world: int, sequence: int, stage: int
) -> None:
    chosen = settings(
        texts,
        tmp_path / "run",
        parallel__sequence=sequence,
        engine__zero_stage=stage,
        checkpoint__resume=str(uninterrupted / "checkpoints" / "step-00000006"),
    )
    run_ranks(world, train, chosen)
    got, expected = lines(tmp_path / "run"), [line for line in lines(uninterrupted) if line["step"] > 6]
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for line, other in zip(got, expected, strict=True):
        for key in EXACT:
            if key in other:
                assert line[key] == pytest.approx(other[key], rel=1e-4)


def steps_told(rank: int, world: int, chosen: Settings) -> list[list[int]]:
    told: dict[Mixer, list[int]] = {}
    tell = Mixer.at_step

    def note(mixer: Mixer, step: int) -> None:
        told.setdefault(mixer, []).append(step)
        tell(mixer, step)

    Mixer.at_step = note
    try:
        train(rank, world, chosen)
    finally:
        Mixer.at_step = tell
    return list(told.values())


def test_mixers_are_told_every_step(texts: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path / "run", evaluation__at_start=False)
    (told,) = run_ranks(1, steps_told, chosen)
    layers = chosen.model["depth"]
    # The rehearsal before the run, that which counts its work, and the model.
    assert told == layers * [[0]] + 2 * layers * [list(range(8))]


def train_on_a_full_disk(rank: int, world: int, chosen: Settings, number: int) -> str:
    """Every write of a checkpoint fails from the second one on, with that number of the system's."""
    calls, said, write = [], [], TensorWriter.write

    def full(writer: TensorWriter, name: str, piece: torch.Tensor) -> None:
        calls.append(name)
        if "step-00000002" not in str(writer.path):
            raise OSError(number, os.strerror(number))
        write(writer, name, piece)

    TensorWriter.write = full  # type: ignore[method-assign]
    try:
        trainer = Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"])
        trainer.outputs.say = said.append  # type: ignore[method-assign]
        with pytest.raises(failure.RunFailed, match=rf"not all of it is kept: checkpoint .*{os.strerror(number)}"):
            trainer.run()
    finally:
        TensorWriter.write = write  # type: ignore[method-assign]
    assert calls
    return "\n".join(said)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device (rank 0). Earlier ones stay; free space or check run.dir"),
        (errno.EROFS, "Read-only file system (rank 0). Earlier ones stay; make it writable, or name another run.dir"),
    ],
)
def test_a_full_disk_keeps_the_last_good_checkpoint_and_fails_the_run(
    texts: Path, tmp_path: Path, number: int, told: str
) -> None:
    chosen = settings(texts, tmp_path / "run", trainer__steps=5, checkpoint__asynchronous=False)
    (said,) = run_ranks(1, train_on_a_full_disk, chosen, number)
    assert "The run goes on and saves again after step 5" in said
    assert "NOT KEPT      checkpoint" in said
    assert said.count(told) == 2
    assert lines(tmp_path / "run")[-1]["step"] == 5
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def refuse(rank: int, world: int, chosen: Settings) -> str:
    with pytest.raises((ValueError, ArithmeticError)) as error:
        train(rank, world, chosen)
    return str(error.value)


def test_every_rank_refuses_with_the_same_words(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bad = [
        (settings(texts, tmp_path / "file" / "run"), "run.dir must be a folder that can be written; got"),
        (settings(texts, tmp_path, data__sequence_length=97, parallel__sequence=2), "data.sequence_length must be a"),
        (settings(tmp_path / "nothing", tmp_path), "data.path must be"),
        (settings(texts, tmp_path, checkpoint__resume=str(tmp_path / "none")), "checkpoint.resume must be"),
        (settings(texts, uninterrupted, checkpoint__resume="none"), "run.dir must be a new folder"),
        (settings(texts, uninterrupted, trainer__seed=5), "seed must be 5; got 0"),
        (settings(texts, uninterrupted, data__sequence_length=64), "sequence_length must be 64; got 96"),
    ]
    old = shutil.copytree(uninterrupted, tmp_path / "old")
    for file in old.glob("checkpoints/*/index.json"):
        index = json.loads(file.read_text())
        index["state"]["data"]["version"] = 1
        del index["crc32"]
        file.write_text(json.dumps(index))
    bad.append((settings(texts, old), "version must be 2; got 1. Its rows come in another order: use the"))
    heads = settings(tmp_path / "nothing", tmp_path)  # a model is refused before its data are read
    heads.model["mixers"] = {**MODEL["mixers"], "softmax": {**MODEL["mixers"]["softmax"], "heads": 5}}  # type: ignore[dict-item]
    wide = settings(texts, uninterrupted)
    wide.model["width"] = 64
    small = settings(texts, tmp_path)
    small.model["vocabulary"] = 100
    bad += [
        (heads, "heads must divide width=32; got 5"),
        (wide, "width was 32 and is 64"),
        (small, "model.vocabulary must be at least the data's 257; got 100"),
    ]
    for chosen, message in bad:
        first, second = run_ranks(2, refuse, chosen)
        assert message in first
        assert first == second


def test_a_loss_that_is_not_finite_ends_the_run(texts: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path, optimizer__learning_rate=1e12, trainer__clip=0.0, trainer__steps=30)
    (message,) = run_ranks(1, refuse, chosen)
    assert "the loss must be finite; got" in message
    assert "Lower optimizer.learning_rate" in message


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_gradients_that_are_never_finite_end_the_run(texts: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    chosen = settings(
        texts,
        tmp_path / "run",
        engine__zero_stage=stage,
        trainer__dtype=dtype,
        trainer__steps=30,
        trainer__max_skipped_steps=4,
        checkpoint__every=0,
        evaluation__every=0,
    )
    results = run_ranks(2, train_with_gradients_that_are_not_finite, chosen, range(4, 8))
    assert results == 2 * [("the gradient must be finite; got 4 step(s) in a row, 4 to 7, where it was not", 7)]


def test_steps_that_are_skipped_now_and_then_do_not_end_the_run(texts: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path / "run", trainer__steps=9, trainer__max_skipped_steps=4, evaluation__every=0)
    bad = [1, 2, 3, 5, 6, 7, 9]
    assert run_ranks(1, train_with_gradients_that_are_not_finite, chosen, bad) == [("", 9)]
    chosen = settings(texts, tmp_path / "few", trainer__steps=3, evaluation__every=0)
    ((said, _),) = run_ranks(1, train_with_gradients_that_are_not_finite, chosen, [1, 2, 3])
    assert "got 3 step(s) in a row, 1 to 3" in said  # all that there were


def train_with_gradients_that_are_not_finite(
    rank: int, world: int, chosen: Settings, bad: Container[int]
) -> tuple[str, int]:
    """One rank's gradient is not, in the steps `bad`; the start of the reason for which the run ended, and its step."""
    trainer = Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"])
    backward = trainer.engine.backward

    def spoil(loss: torch.Tensor, *rest: object) -> None:
        backward(loss * math.inf if trainer.step + 1 in bad and rank == world - 1 else loss, *rest)

    trainer.engine.backward = spoil  # type: ignore[method-assign]
    try:
        trainer.run()
    except failure.NotFinite as error:
        return str(error).partition(", and the weights")[0], trainer.step
    return "", trainer.step


def truncated(rank: int, world: int, chosen: Settings, context: int) -> tuple[float, float, int]:
    """evaluate_truncated, and the same by one forward for each target."""
    trainer = Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"])
    stream, model = trainer.corpus.validation, trainer.engine.module
    got = evaluate_truncated(trainer.engine, stream, 2, context, 64)
    whole = evaluate(trainer.engine, stream, trainer.layout, Strategy(), 2, 1)
    assert whole.targets == got.targets
    total, count = 0.0, 0
    for number in range(2):
        row, start = stream.row(number), 0
        for length in row.lengths:
            for end in range(start + 1, start + length + 1):
                if row.targets[end - 1] == NO_TARGET:
                    continue
                seen = torch.from_numpy(row.tokens[max(start, end - context) : end])[None]
                with torch.no_grad():
                    logits = model(seen, Sequence.single(Documents.whole(1, seen.shape[1])))
                total -= float(logits[0, -1].log_softmax(-1)[int(row.targets[end - 1])])
                count += 1
            start += length
    trainer.outputs.close()
    return got.total, total, got.targets - count


def test_the_truncated_context_is_exactly_the_last_tokens(texts: Path, uninterrupted: Path, tmp_path: Path) -> None:
    chosen = settings(
        texts, tmp_path, parallel__sequence=2, checkpoint__resume=str(uninterrupted), evaluation__sample_tokens=0
    )
    for got, expected, surplus in run_ranks(2, truncated, chosen, 7):
        assert got == pytest.approx(expected, rel=1e-4)
        assert surplus == 0


def resume_otherwise(rank: int, world: int, chosen: Settings) -> str:
    with pytest.raises(ValueError, match="model must be that of checkpoint") as refused:
        Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"])
    return str(refused.value)


def test_a_checkpoint_of_a_model_with_other_settings_is_refused(
    texts: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    path = str(uninterrupted / "checkpoints" / "step-00000008")
    chosen = settings(texts, tmp_path / "run", checkpoint__resume=path)
    chosen.model["norm_eps"] = 1e-3  # no tensor tells
    (message,) = run_ranks(1, resume_otherwise, chosen)
    assert "norm_eps was 1e-06 and is 0.001" in message or "norm_eps was None and is 0.001" in message


def test_a_new_run_starts_from_the_weights_of_another(texts: Path, tmp_path: Path) -> None:
    """Its softmax layer as MoBA, on longer rows, with the first run's tokenizer; learning too little to see."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_ranks(1, train, settings(texts, first, trainer__steps=2))
    overrides = [
        f"init_from={first}", f"run.dir={second}", "data=text", f"data.path={texts}",
        "data.sequence_length=192", "optimizer.learning_rate=1e-12", "trainer.steps=1", "logger.wandb.mode=disabled",
    ]  # fmt: skip
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        chosen = to_settings(hydra.compose("train", overrides), overrides, {})
    found = checkpoint.latest(first / "checkpoints")
    assert chosen.init_from == str(found)
    assert chosen.data.tokenizer == str(found / "tokenizer")
    assert chosen.model == MODEL | {"vocabulary": chosen.model["vocabulary"]}
    moba = {"_target_": f"{MIXERS}.sparse.block_sparse_attention.MoBA", "_partial_": True, "heads": 2}
    moba |= {"block_size": 16, "top_k": 2}
    chosen.model = chosen.model | {"mixers": MODEL["mixers"] | {"softmax": moba}}
    run_ranks(1, train, chosen)
    before, after = (dict(checkpoint_tensors(run)) for run in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=0, atol=1e-9), name


def checkpoint_tensors(run: Path) -> list[tuple[str, torch.Tensor]]:
    stored = checkpoint.verify(checkpoint.latest(run / "checkpoints"))
    return [(name, stored.map(name)) for name in stored.tensors if "/" not in name]
