"""A run that is killed, moved, resharded and damaged all the way has the losses of one that nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import stored_checkpoints

SETTINGS = (
    "model=minimax_01_tiny",
    "model.width=64",
    "model.depth=4",
    "model.pattern=[lightning*3,softmax]",
    "model.mixers.lightning.heads=4",
    "model.mixers.softmax.heads=4",
    "model.mixers.softmax.kv_heads=2",
    "data=text",
    "data.tokenizer=bytes",
    "data.rows_per_step=4",
    "data.audit=true",
    "checkpoint.every=3",
    "checkpoint.keep=4",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "logger.wandb.mode=disabled",
    "logger.memory=false",
    "logger.print_every=1",
)
AGAIN = 75  # the status of a run that a signal has ended and that can go on
SECONDS = 600  # after which a launch hangs: sixty steps beside other work on the same cores take minutes


@dataclass(frozen=True)
class Leg:
    """A launch: on how many ranks and how, what is done to the newest checkpoint before it, and what ends it.

    until: the step in which the signal comes; None for a launch that goes on to the end.
    """

    ranks: int
    settings: tuple[str, ...] = ()
    damage: str | None = None
    number: int = signal.SIGKILL
    until: int | None = None


def launch(folder: Path, run: Path, ranks: int, *settings: str) -> list[commands.Command]:
    """A process for each rank, which share every row, as Slurm starts them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [*SETTINGS, f"data.path={folder / 'texts'}", f"data.cache_dir={folder / 'tokens'}", f"run.dir={run}"]
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        given = (*arguments, f"parallel.sequence={ranks}", *settings)
        environment = common | (own if ranks > 1 else {})
        started.append(commands.Command("longreach.launch.train", *given, folder=folder, environment=environment))
    return started


def lines(run: Path) -> list[dict[str, float]]:
    """The metrics, but for a line that is being written."""
    file = run / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [line for line in map(json.loads, whole.splitlines()) if "loss" in line]


def wait_for(run: Path, step: int, processes: list[commands.Command]) -> None:
    deadline = time.monotonic() + SECONDS
    while not (there := lines(run)) or there[-1]["step"] < step:
        ended = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not ended, ended[0][-3000:]
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.01)


def damage(run: Path, how: str) -> None:
    """The newest checkpoint has a wrong byte, or there is one that a kill cut off."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    if how == "wrong byte":
        stored_checkpoints.flipped(newest)
    else:
        step = int(newest.name.removeprefix("step-"))
        half = newest.with_name(f"step-{step + 1:08d}")
        half.mkdir()
        (half / "weights-00001-of-00001.safetensors").write_bytes(b"half")


def torture(folder: Path, stages: str, legs: list[Leg]) -> None:
    """Goes through the legs, and compares with one rank that is left alone."""
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(60):
        words = "".join(f"{draw.choice('abcdefgh')}{draw.randrange(100)} " for _ in range(draw.randrange(4, 400)))
        (folder / "texts" / f"{number}.txt").write_text(words)
    alone, run = folder / "alone", folder / "run"
    (process,) = launch(folder, alone, 1, stages)
    said, _ = process.communicate(SECONDS)
    assert process.returncode == 0, said[-3000:]
    for leg in legs:
        if leg.damage is not None:
            damage(run, leg.damage)
        before = int(lines(run)[-1]["step"]) if lines(run) else 0
        processes = launch(folder, run, leg.ranks, stages, *leg.settings)
        if leg.until is not None:
            assert before < leg.until, "the leg before ends later"
            wait_for(run, leg.until, processes)
            os.kill(draw.choice(processes).pid, leg.number)
        said = [process.communicate(SECONDS)[0] for process in processes]
        codes = [process.returncode for process in processes]
        if leg.until is None:
            assert codes == [0] * leg.ranks, said[0][-3000:]
        elif leg.number == signal.SIGKILL:
            assert 0 not in codes
        else:
            assert codes == [AGAIN] * leg.ranks, said[0][-3000:]
        if leg.damage == "wrong byte":
            assert "passed over" in said[0]
    expected, got = lines(alone), lines(run)
    assert [line["step"] for line in got] == [line["step"] for line in expected] == list(range(1, len(got) + 1))
    for line, other in zip(got, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5), line["step"]
        assert line["tokens"] == other["tokens"]
    audit = commands.run("longreach.launch.audit", f"run={run}", folder=folder)
    assert audit.returncode == 0, audit.stdout + audit.stderr


ZIGZAG = "parallel.layout=zigzag"


@pytest.mark.slow
def test_a_run_that_is_killed_moved_and_damaged_has_the_losses_of_one_that_is_not(tmp_path: Path) -> None:
    stages = "stages=[{steps: 8, data.sequence_length: 128}, {steps: 8, data.sequence_length: 256}]"
    legs = [
        Leg(1, until=5),
        Leg(2, (ZIGZAG, "engine.zero_stage=3"), "cut off", signal.SIGTERM, until=9),
        Leg(2, ("engine.zero_stage=2",), "wrong byte"),
    ]
    torture(tmp_path, stages, legs)


@pytest.mark.many
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sixty_steps_of_torture(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    stages = "stages=[{steps: 30, data.sequence_length: 128}, {steps: 30, data.sequence_length: 512}]"
    moments, legs = sorted(draw.sample(range(4, 54), 7)), []
    ways = [(1, 1), (2, 3), (4, 2), (2, 1), (2, 3), (4, 3), (2, 2)]
    for (ranks, zero), step in zip(ways, moments, strict=True):
        settings = (f"engine.zero_stage={zero}", *((ZIGZAG,) if ranks > 1 and draw.random() < 0.5 else ()))
        harm = draw.choice(["wrong byte", "cut off", None]) if legs and step > moments[0] + 6 else None
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        legs.append(Leg(ranks, settings, harm, number, step))
    torture(tmp_path, stages, [*legs, Leg(2, ("engine.zero_stage=2",))])
