"""A user's callback: its hooks run on every rank, around the built-in ones, and may log, communicate and fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from longreach.launch.build import build
from longreach.parallel.mesh import Mesh
from longreach.trainer.callback import Callback
from longreach.trainer.checkpoint.settings import CheckpointSettings
from longreach.trainer.data.settings import DataSettings, RecallSettings
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.ranks.settings import ParallelSettings
from longreach.trainer.run.settings import LoggerSettings, RunSettings, WandbSettings
from longreach.trainer.settings import Settings, TrainerSettings
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs on ranks

MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "width": 16,
    "depth": 1,
    "pattern": ["softmax"],
    "mixers": {
        "softmax": {
            "_target_": "longreach.models.mixers.softmax.softmax_attention.SoftmaxAttention",
            "_partial_": True,
            "heads": 2,
        }
    },
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 16},
}
EXACT = ("step", "loss", "grad_norm", "validation_loss")


def settings(run: Path, ranks: int) -> Settings:
    return Settings(
        model=dict(MODEL),
        data=DataSettings(
            "recall", sequence_length=32, rows_per_step=2, vocabulary_size=32, recall=RecallSettings(pairs=4)
        ),
        trainer=TrainerSettings(steps=3),
        parallel=ParallelSettings(sequence=ranks),
        evaluation=EvaluationSettings(every=2, rows=2),
        checkpoint=CheckpointSettings(every=2, asynchronous=False),
        logger=LoggerSettings(wandb=WandbSettings(mode="disabled")),
        run=RunSettings(dir=str(run)),
    )


class Watcher(Callback):
    """Notes its hooks, and logs the sum over the ranks of a number that each has."""

    def __init__(self, fail_after: int = 0) -> None:
        self.fail_after, self.calls = fail_after, []

    def start(self, trainer: Trainer) -> None:
        self.calls.append(("start", trainer.step))

    def before_step(self, trainer: Trainer) -> None:
        self.calls.append(("before_step", trainer.step))

    def after_step(self, trainer: Trainer) -> None:
        saved = trainer.directory.checkpoints / f"step-{trainer.step:08d}"
        self.calls.append(("after_step", trainer.record["step"], saved.exists()))
        if trainer.step == self.fail_after:
            raise RuntimeError("out of luck")
        total = torch.tensor(10.0**trainer.mesh.rank)
        if trainer.mesh.world_size > 1:
            dist.all_reduce(total)
        trainer.outputs.log({"step": trainer.step, "ones": total.item()})

    def end(self, trainer: Trainer) -> None:
        self.calls.append(("end", trainer.step))

    def close(self) -> None:
        self.calls.append(("close",))


def watched(rank: int, world: int, run: Path, fail_after: int = 0) -> list[tuple[Any, ...]]:
    chosen, watcher = settings(run, world), Watcher(fail_after)
    trainer = Trainer(chosen, build, Mesh.create(world), torch.device("cpu"), ["train"], {"mine": watcher})
    if not fail_after:
        trainer.run()
    else:
        with pytest.raises(RuntimeError, match="out of luck") as error:
            trainer.run()
        assert error.value.__notes__ == ["callbacks.mine.after_step"]
    return watcher.calls


def unwatched(rank: int, world: int, run: Path) -> None:
    Trainer(settings(run, world), build, Mesh.create(world), torch.device("cpu"), ["train"]).run()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in lines(run) if "ones" not in line]


@pytest.mark.parametrize("ranks", [1, 2])
def test_hooks_run_on_every_rank_after_the_built_in_ones_and_change_no_number(tmp_path: Path, ranks: int) -> None:
    calls = run_ranks(ranks, watched, tmp_path / "watched")
    assert calls == ranks * [
        [
            ("start", 0),
            *(("before_step", 0), ("after_step", 1, False)),
            *(("before_step", 1), ("after_step", 2, True)),
            *(("before_step", 2), ("after_step", 3, True)),
            ("end", 3),
            ("close",),
        ]
    ]
    logged = [line for line in lines(tmp_path / "watched") if "ones" in line]
    assert logged == [{"step": step, "ones": {1: 1.0, 2: 11.0}[ranks]} for step in (1, 2, 3)]
    run_ranks(ranks, unwatched, tmp_path / "unwatched")
    assert exact(tmp_path / "watched") == exact(tmp_path / "unwatched")


def test_a_callback_that_fails_ends_the_run_under_its_name_and_is_closed(tmp_path: Path) -> None:
    (calls,) = run_ranks(1, watched, tmp_path / "run", 2)
    assert calls[-2:] == [("after_step", 2, True), ("close",)]  # what was saved after that step is there
    assert lines(tmp_path / "run")[-1]["step"] == 2
