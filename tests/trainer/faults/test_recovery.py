"""Bad steps and bad rows in whole runs: nothing learns from them, they are named, and the run goes on without them."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from test_trainer import exact, lines, settings, train

from longreach.launch.build import build
from longreach.parallel.mesh import Mesh
from longreach.trainer.data.audit.proof import prove
from longreach.trainer.data.packing import segment_of
from longreach.trainer.faults.ledger import Ledger
from longreach.trainer.run import failure
from longreach.trainer.run.outputs import Outputs
from longreach.trainer.settings import Settings
from longreach.trainer.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs on several ranks

QUIET = {"evaluation__every": 0, "evaluation__at_start": False, "evaluation__sample_tokens": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number}, and then some more of it. " * 20)
    return folder


@contextmanager
def heard(chosen: Settings) -> Iterator[tuple[Trainer, list[str]]]:
    """A trainer, and what it says, after a rollback too."""
    said: list[str] = []
    say = Outputs.say

    def note(outputs: Outputs, message: str) -> None:
        said.append(message)
        say(outputs, message)

    Outputs.say = note  # type: ignore[method-assign]
    try:
        yield Trainer(chosen, build, Mesh.create(chosen.parallel.sequence), torch.device("cpu"), ["train"]), said
    finally:
        Outputs.say = say  # type: ignore[method-assign]


def spoiled(rank: int, world: int, chosen: Settings) -> tuple[list[bool], list[str]]:
    """Step 3 has a loss of NaN on the last rank, step 4 one ten times too high: which steps changed the weights."""
    with heard(chosen) as (trainer, said):
        changed, forward, step = [], trainer.engine._engine.forward, trainer.engine.step

        def badly(*inputs: Any) -> Any:
            loss, *rest = forward(*inputs)
            if trainer.step == 2 and rank == world - 1:
                loss = loss * math.nan
            return (loss * 10 if trainer.step == 3 else loss, *rest)

        def weights() -> list[torch.Tensor]:
            fragments = [trainer.engine.fragment(x, "parameter") for _, x in trainer.engine.named_parameters()]
            return [fragment.values.clone() for fragment in fragments]

        def watched(*inputs: Any) -> Any:
            before = weights()
            norm = step(*inputs)
            changed.append(any(not torch.equal(*both) for both in zip(before, weights(), strict=True)))
            return norm

        trainer.engine._engine.forward, trainer.engine.step = badly, watched  # type: ignore[method-assign]
        trainer.run()
    return changed, said


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_a_loss_of_nan_and_a_spike_change_no_weight_and_are_named(
    texts: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    more = {"trainer__spike_deviations": 20.0, "trainer__spike_window": 2, "trainer__dtype": dtype}
    chosen = settings(texts, tmp_path / "run", engine__zero_stage=stage, trainer__steps=5, **more, **QUIET)
    results = run_ranks(2, spoiled, chosen)
    assert [changed for changed, _ in results] == 2 * [[True, True, False, False, True]]
    said = "\n".join(results[0][1])
    rows = {3: "rows 8 to 11, document(s) ", 4: "rows 12 to 15, document(s) "}
    assert f"step 3: the loss is not finite (nan); the weights stay as they are ({rows[3]}" in said
    assert "step 4: the loss is a spike (" in said
    assert f"; the weights stay as they are ({rows[4]}" in said
    assert [line.get("skipped_steps") for line in lines(tmp_path / "run")] == [None, None, 1, 2, 2]
    state = json.loads((tmp_path / "run/checkpoints/step-00000005/index.json").read_text())["state"]
    assert [each[:2] for each in state["skipped_rows"]] == [[8, 12], [12, 16]]
    told = [json.loads(line) for line in (tmp_path / "run/faults.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["rows"]) for line in told] == [
        ("skipped", 3, [8, 12]),
        ("skipped", 4, [12, 16]),
    ]
    assert all(len(of_row) > 0 for line in told for of_row in line["documents"])


def bad_rows(
    rank: int, world: int, chosen: Settings, first: int, stop: int, ends: int | None = None
) -> tuple[list[int], list[str], str]:
    """The gradient of rows first .. stop is not finite on one rank: the steps in turn, and why the run failed.

    ends: the run is interrupted in the step after this one, once rows behind the bad ones have been read.
    """
    with heard(chosen) as (trainer, said):
        met, backward = [0], trainer.engine.backward

        def spoil(loss: torch.Tensor, *rest: object) -> None:
            if ends == trainer.step and trainer.row >= stop:
                raise KeyboardInterrupt
            if met[-1] != trainer.step + 1:
                met.append(trainer.step + 1)
            backward(loss * math.inf if first <= trainer.row < stop and rank == 0 else loss, *rest)

        trainer.engine.backward = spoil  # type: ignore[method-assign]
        try:
            trainer.run()
        except (failure.NotFinite, KeyboardInterrupt) as error:
            return met[1:], said, str(error)
    return met[1:], said, ""


def test_too_many_bad_steps_roll_the_run_back_past_their_rows(texts: Path, tmp_path: Path) -> None:
    """From there it is, bit by bit, a run that goes on from that checkpoint with the rows after them."""
    more = {"trainer__max_skipped_steps": 3, "checkpoint__keep": 9, "engine__zero_stage": 3}
    run = tmp_path / "run"
    audited = settings(texts, run, data__audit=True, **more, **QUIET)
    (steps, said, failed), (also, *_) = run_ranks(2, bad_rows, audited, 20, 32)
    assert steps == also == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
    assert not failed
    told = "back from step 8 to step-00000004, as 3 steps in a row were skipped; rows 16 to 31 are passed over"
    assert sum(told in line for line in said) == 1
    assert [line["step"] for line in lines(run)] == list(range(1, 9))
    index = json.loads((run / "checkpoints/step-00000008/index.json").read_text())
    assert [each[:2] for each in index["state"]["skipped_rows"]] == [[16, 32]]
    assert index["state"]["skipped_steps"] == 3
    assert index["state"]["data"]["row"] == 32 + 4 * 4
    proof = prove(run)  # what was passed over is no gap
    assert proof.holds
    assert (proof.steps, proof.findings[0].passed, proof.findings[0].tokens) == (8, 16 * 96, 48 * 96)
    other = shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "step-00000004")
    began = json.loads((other / "index.json").read_text())
    del began["crc32"]
    assert began["state"]["data"]["row"] == 16
    began["state"]["data"]["row"] = 32
    (other / "index.json").write_text(json.dumps(began))
    run_ranks(2, train, settings(texts, tmp_path / "other", checkpoint__resume=str(other), **more, **QUIET))
    assert exact(run)[4:] == exact(tmp_path / "other")
    files = json.loads((tmp_path / "other/checkpoints/step-00000008/index.json").read_text())["files"]
    assert index["files"] == files  # with the checksum of every tensor


def test_rollbacks_come_to_an_end(texts: Path, tmp_path: Path) -> None:
    more = {"trainer__max_skipped_steps": 2, "trainer__max_rollbacks": 2, "trainer__steps": 9, "checkpoint__keep": 9}
    more["checkpoint__asynchronous"] = True  # what is being written counts too
    ((steps, said, failed),) = run_ranks(1, bad_rows, settings(texts, tmp_path / "run", **more, **QUIET), 20, 10**6)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 5, 6, 3, 4]  # the second time from an older one
    assert [line.partition(",")[0] for line in said if "back from" in line] == [
        "back from step 7 to step-00000004",
        "back from step 6 to step-00000002",
    ]
    assert "got 2 step(s) in a row, 3 to 4, where it was not" in failed
    assert "after 2 rollback(s) (trainer.max_rollbacks)" in failed
    assert '"kind": "died", "step": 5, ' in (tmp_path / "run/faults.jsonl").read_text()


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_rollback_has_left_behind_is_not_gone_on_from(texts: Path, tmp_path: Path, kept: bool) -> None:
    """The second rollback takes step 2, and the run ends before it has passed step 4, that of the first one, again."""
    more = {"trainer__max_skipped_steps": 2, "trainer__steps": 7, "checkpoint__keep": 9, "data__audit": True}
    more |= {"checkpoint__milestones": 2 * kept} | QUIET

    def chosen(run: str) -> Settings:
        return settings(texts, tmp_path / run, **more)

    ((whole, said, _),) = run_ranks(1, bad_rows, chosen("whole"), 20, 36)
    assert whole == [1, 2, 3, 4, 5, 6, 7, 5, 6, 3, 4, 5, 6, 7]
    ((ended, said, _),) = run_ranks(1, bad_rows, chosen("run"), 20, 36, 3)
    assert ended == whole[:10]
    assert any("back from step 6 to step-00000002" in line for line in said)
    left = tmp_path / "run/checkpoints/step-00000004.left"
    assert left.is_dir()  # until another one is written
    assert prove(tmp_path / "run").holds
    assert run_ranks(1, bad_rows, chosen("run"), 20, 36)[0][0] == [3, 4, 5, 6, 7]
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")
    assert prove(tmp_path / "run").holds
    assert left.is_dir() == kept


def deadly_rows(rank: int, world: int, chosen: Settings) -> tuple[list[str], str]:
    with heard(chosen) as (trainer, said):
        forward = trainer.engine._engine.forward

        def dies(*inputs: Any) -> Any:
            if 8 <= trainer.row < 12:
                raise RuntimeError("a kernel fails on these rows")
            return forward(*inputs)

        trainer.engine._engine.forward = dies
        try:
            trainer.run()
        except RuntimeError as error:
            return said, str(error)
    return said, ""


def test_rows_in_which_a_run_died_twice_are_passed_over(texts: Path, tmp_path: Path) -> None:
    chosen = settings(texts, tmp_path / "run", trainer__steps=5, **QUIET)
    for _ in range(2):
        ((_, failed),) = run_ranks(1, deadly_rows, chosen)
        assert failed == "a kernel fails on these rows"
    ((said, failed),) = run_ranks(1, deadly_rows, chosen)
    assert not failed
    assert sum("step 3: rows 8 to 11 passed over (the run died there 2 times: RuntimeError)" in it for it in said) == 1
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    state = json.loads((tmp_path / "run/checkpoints/step-00000005/index.json").read_text())["state"]
    assert state["skipped_rows"] == [[8, 12, "the run died there 2 times: RuntimeError"]]
    assert state["data"]["row"] == 24


def test_other_data_have_faults_of_their_own(texts: Path, tmp_path: Path) -> None:
    """Of data given by data.restart, no row is passed over for what the ones before did, and none of those comes back.

    Rows of both are counted from 0. Of the new ones 0 to 15 are bad: two rollbacks, none behind the restart.
    """
    (tmp_path / "other").mkdir()
    for number in range(40):
        (tmp_path / "other" / f"{number}.txt").write_text(f"another text, {number} in number, " * 30)
    run, quiet = tmp_path / "run", QUIET | {"trainer__max_skipped_steps": 2, "checkpoint__keep": 9}
    before = settings(texts, run, trainer__steps=4, **quiet)
    ((steps, _, _),) = run_ranks(1, bad_rows, before, 4, 8)
    assert steps == [1, 2, 3, 4]
    state = json.loads((run / "checkpoints/step-00000004/index.json").read_text())["state"]
    assert [each[:2] for each in state["skipped_rows"]] == [[4, 8]]
    for _ in range(2):
        Ledger(run, segment_of(state["data"])).add("died", 5, (20, 24), "RuntimeError")
    after = settings(tmp_path / "other", run, trainer__steps=10, data__restart=True, **quiet)
    ((steps, said, failed),) = run_ranks(1, bad_rows, after, 0, 16)
    assert not failed
    assert steps == [5, 6, 5, 6, 5, 6, 7, 8, 9, 10]
    assert [line.partition(",")[0] for line in said if "back from" in line] == 2 * ["back from step 6 to step-00000004"]
    state = json.loads((run / "checkpoints/step-00000010/index.json").read_text())["state"]
    assert [each[:2] for each in state["skipped_rows"]] == [[0, 16]]
    assert (state["data"]["row"], state["segment_began"]) == (16 + 4 * 6, 4)
