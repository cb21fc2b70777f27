"""Checkpoints that are written while training goes on: the bytes of those that training waits for, or nothing."""

import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_model import make_engine, train_step

from longreach.trainer.checkpoint import checkpoint
from longreach.trainer.checkpoint.background import Background
from longreach.trainer.checkpoint.checkpoint import latest, save, verify
from longreach.trainer.checkpoint.commit import Retention
from longreach.trainer.checkpoint.tensor_files import TensorWriter

pytestmark = pytest.mark.slow  # engines on several ranks


class Gate:
    """Holds up the threads that write until it is opened; `reached` when one has come."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original = TensorWriter.write

        def write(writer: TensorWriter, name: str, piece: torch.Tensor) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                self.open.wait(60)
            original(writer, name, piece)

        patch.setattr(TensorWriter, "write", write)


def write_beside(folder: Path) -> None:
    (folder / "note.txt").write_text("here")


def save_both_ways(rank: int, world: int, folder: Path, stage: int, dtype: str) -> bool:
    """Whether training went on while the second way wrote the state that the first way had written."""
    engine = make_engine(stage, dtype=dtype, clip=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PIECE", 16)
        background = Background(engine)
        for step in range(2):  # the copy is used twice
            train_step(engine, step, rank, world, 1)
            state = {"step": step + 1}
            save(engine, folder / "waited for", state, 2, write_beside)
            gate = Gate(patch)
            background.begin(folder / "beside", state, Retention(2), write_beside)
            state["step"] = 99  # as a stage changes what the next checkpoint says
            train_step(engine, 10 + step, rank, world, 1)
            assert gate.reached.wait(60)
            under_way = background.news() is None
            gate.open.set()
            background.wait()
            path, error = background.news()
            assert error is None
            assert path.name == f"step-{step + 1:08d}"
            assert background.news() is None
    return under_way


@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [(1, 0, "float32"), (2, 0, "float32"), (2, 1, "bfloat16"), (2, 2, "float32"), (2, 3, "bfloat16")],
)
def test_what_is_written_is_the_state_when_it_was_copied(tmp_path: Path, world: int, stage: int, dtype: str) -> None:
    assert all(run_ranks(world, save_both_ways, tmp_path, stage, dtype))
    for step in ("step-00000001", "step-00000002"):
        files = [
            {file.name: file.read_bytes() for file in (tmp_path / way / step).iterdir()}
            for way in ("waited for", "beside")
        ]
        assert files[0] == files[1]
        assert "note.txt" in files[0]
    assert not list((tmp_path / "beside").glob(".*"))


def save_on_a_full_disk(rank: int, world: int, folder: Path, full_rank: int) -> list[str | None]:
    background = Background(make_engine(1))
    problems = []
    for step in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            if rank == full_rank and step == 2:

                def write(writer: TensorWriter, name: str, piece: torch.Tensor) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr(TensorWriter, "write", write)
            background.begin(folder, {"step": step}, Retention(1))
            background.wait()
        problems.append(str(background.news()[1]))
    return problems


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_is_told_on_every_rank_and_the_next_one_is_written(tmp_path: Path, full_rank: int) -> None:
    for first, second, third in run_ranks(2, save_on_a_full_disk, tmp_path, full_rank):
        assert first == third == "None"
        assert "step-00000002 could not be written: [Errno 28] No space left on device" in second
        assert f"(rank {full_rank})" in second
        assert "free space" in second
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def abandon(rank: int, world: int, folder: Path) -> tuple[str, float]:
    """Rank 1 hangs in writing the second checkpoint, and the run fails: what becomes of it, and after how long."""
    background = Background(make_engine(2))
    background.begin(folder, {"step": 1}, Retention(1))
    background.wait()
    assert background.news()[1] is None
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        if rank == 0:
            gate.open.set()
        background.begin(folder, {"step": 2}, Retention(1))
        assert gate.reached.wait(60)
        begun = time.monotonic()
        background.settle(0.2)
        took = time.monotonic() - begun
        torch.distributed.barrier()
        gate.open.set()
        background.settle(30)
        return str(background.news()), took


def test_what_does_not_end_in_time_is_abandoned_and_leaves_the_one_before(tmp_path: Path) -> None:
    for news, took in run_ranks(2, abandon, tmp_path):
        assert "it was abandoned, as the run ends" in news
        assert took < 30
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert not (tmp_path / "step-00000002").exists()


def lose_the_store(rank: int, world: int, folder: Path, victim: int, error: Exception) -> str:
    background = Background(make_engine(1))
    with pytest.MonkeyPatch.context() as patch:
        if rank == victim:

            def put(notes: object, name: str, value: object) -> None:
                raise error

            patch.setattr("longreach.trainer.checkpoint.background._Notes.put", put)
        background.begin(folder, {"step": 1}, Retention(1))
        background.wait()
    return str(background.news()[1])


@pytest.mark.parametrize(
    ("victim", "error", "told"),
    [
        (0, RuntimeError("Connection reset by peer"), "store does not answer (Connection reset by peer)"),
        (1, RuntimeError("Connection reset by peer"), "store does not answer (Connection reset by peer)"),
        (1, MemoryError("no room"), "could not be written: MemoryError: no room"),
    ],
)
def test_a_rank_that_cannot_reach_the_others_ends_their_waiting(
    tmp_path: Path, victim: int, error: Exception, told: str
) -> None:
    said = run_ranks(2, lose_the_store, tmp_path, victim, error)
    assert told in said[victim]
    assert "it was abandoned" in said[1 - victim]
    assert latest(tmp_path) is None


def keep_some(rank: int, world: int, folder: Path) -> None:
    engine = make_engine(1)
    background = Background(engine)
    for step in range(1, 9):
        if step % 2:
            save(engine, folder, {"step": step}, 2, kept=step == 3)
        else:
            background.begin(folder, {"step": step}, Retention(2, kept=step == 4))
            background.wait()
    save(engine, folder, {"step": 4}, 2)  # a run that was resumed from 3 comes by 4 again


def test_those_that_are_marked_stay(tmp_path: Path) -> None:
    run_ranks(1, keep_some, tmp_path)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["3", "4", "7", "8"]
    assert [path.name[-1] for path in sorted(tmp_path.iterdir()) if (path / "kept").exists()] == ["3", "4"]
    for path in tmp_path.iterdir():
        verify(path)


def begin_without_memory(rank: int, world: int, folder: Path) -> str:
    background = Background(make_engine(1))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def copy(*arguments: object, **options: object) -> None:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

            patch.setattr("longreach.trainer.checkpoint.background._HostCopy", copy)
        with pytest.raises(checkpoint.CheckpointError) as raised:
            background.begin(folder, {"step": 1}, Retention(1))
    background.begin(folder, {"step": 1}, Retention(1))
    background.wait()
    return str(raised.value)


def test_a_rank_without_memory_for_the_copy_says_what_helps_on_all(tmp_path: Path) -> None:
    for said in run_ranks(2, begin_without_memory, tmp_path):
        assert "no memory for a copy on the host (DefaultCPUAllocator: can't" in said
        assert "checkpoint.asynchronous=false" in said
    verify(tmp_path / "step-00000001")
