"""The proof of an audit: whole epochs hold, and whatever is planted in the file is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored_checkpoints

from longreach.trainer.checkpoint.stored import FORMAT, INDEX
from longreach.trainer.data.audit.file import NAME, AuditFile, AuditRows, AuditSource, packed
from longreach.trainer.data.audit.proof import Proof, prove
from longreach.trainer.data.packing import TokenStream

LENGTHS = [7, 23, 4, 11, 30, 2, 15]  # 92 tokens
DOCUMENTS = [10, 11, 12, 20, 21, 22, 23]
ROWS = 2  # of a step
Records = list[AuditSource | AuditRows]


class Texts:
    def __init__(self) -> None:
        self.lengths = np.zeros(30, np.int64)
        self.lengths[DOCUMENTS] = LENGTHS

    def __getitem__(self, document: int) -> np.ndarray:
        return np.arange(self.lengths[document])


def two_segments(packing: str, length: int = 32) -> list[TokenStream]:
    """Of rows of 32 tokens in four steps, and of 20 after them."""
    streams = []
    for n in (length, 20):
        stream = TokenStream(
            Texts(), np.array(DOCUMENTS), length=n, seed=1, fingerprint="f", packing=packing, name="text"
        )
        streams.append(stream)
    streams[0].begin(4 * ROWS)
    streams[1].follow(streams[0].state(4 * ROWS))
    return streams


def records(packing: str, steps: int = 12, length: int = 32) -> Records:
    """What a run of two segments writes, of rows of 32 tokens, and 20 from step 5 on."""
    made: Records = [AuditSource("text", "f", np.array(DOCUMENTS), np.array(LENGTHS))]
    streams = two_segments(packing, length)
    for step in range(1, steps + 1):
        stream, row = (streams[0], (step - 1) * ROWS) if step <= 4 else (streams[1], (step - 5) * ROWS)
        pieces = [(0, *piece) for number in range(row, row + ROWS) for piece in stream.pieces(number)]
        made.append(AuditRows(step, row, ROWS, np.array(pieces)))
    return made


def proof_of(folder: Path, made: Records) -> Proof:
    (folder / NAME).write_bytes(b"".join(map(packed, made)))
    return prove(folder)


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """A checkpoint without a tensor."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    index = {"format": FORMAT, "files": {}, "adam_steps": step, "state": {"step": step, "data": state}}
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_two_segments_read_is_proved(tmp_path: Path, packing: str) -> None:
    made = records(packing)
    proof = proof_of(tmp_path, made)
    assert proof.holds, proof.table()
    (finding,) = proof.findings
    assert finding.tokens == sum(r.pieces[:, 3].sum() for r in made if isinstance(r, AuditRows))
    assert finding.epochs == finding.tokens // 92 >= 3
    assert (finding.repeats, finding.gaps, proof.steps) == (0, 0, 12)


def piece(made: Records, step: int, index: int, change: tuple[int, int, int]) -> Records:
    record = made[step]
    assert isinstance(record, AuditRows)
    pieces = record.pieces.copy()
    pieces[index, 1:] += change
    return [*made[:step], record._replace(pieces=pieces), *made[step + 1 :]]


def doubled(made: Records) -> Records:
    """Step 2 read once more, as step 3."""
    again, later = made[2], made[3:]
    assert isinstance(again, AuditRows)
    moved = [r._replace(step=r.step + 1, row=r.row + ROWS * (r.step <= 4)) for r in later if isinstance(r, AuditRows)]
    return [*made[:3], again._replace(step=3, row=again.row + ROWS), *moved]


def without(made: Records) -> Records:
    """Without the rows of step 2, as if they had never been there."""
    later = [
        r._replace(step=r.step - 1, row=r.row - ROWS * (r.step <= 4)) for r in made[3:] if isinstance(r, AuditRows)
    ]
    return [*made[:2], *later]


PLANTED: dict[str, tuple[Callable[[Records], Records], str]] = {
    "rows twice": (doubled, "read again in step 3, in epoch 2"),
    "rows left out": (without, "not read in epoch 1"),
    "one token left out": (lambda made: piece(made, 1, 0, (0, 0, -1)), "not read in epoch 1"),
    "a token before a document's first": (lambda made: piece(made, 1, 1, (0, -1, 0)), "are not of the source"),
    "another document": (lambda made: piece(made, 1, 0, (3, 0, 0)), "document"),
    "a step that is not there": (lambda made: [*made[:6], *made[7:]], "step 7 follows step 5"),
    "rows lost in the last epoch": (
        lambda made: [*made[:12], made[12]._replace(row=made[12].row + 1)],  # type: ignore[union-attr]
        "are lost",
    ),
    "rows twice in the last epoch": (
        lambda made: [*made, made[12]._replace(step=13)],  # type: ignore[union-attr]
        "read again in step 13",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    plant, said = PLANTED[name]
    proof = proof_of(tmp_path, plant(records("concat")))
    assert not proof.holds
    assert said in "\n".join(proof.table())


def test_what_is_wrong_is_counted_and_named(tmp_path: Path) -> None:
    source = AuditSource("text", "f", np.array([3, 8]), np.array([5, 4]))
    whole = np.array([(0, 3, 0, 5), (0, 8, 0, 4)])
    repeated = np.array([(0, 3, 0, 3), (0, 3, 2, 2), (0, 8, 0, 4)])  # token 2 twice, token 4 never
    proof = proof_of(tmp_path, [source, AuditRows(1, 0, 1, whole), AuditRows(2, 1, 1, repeated)])
    (finding,) = proof.findings
    assert (finding.epochs, finding.repeats, finding.gaps) == (1, 1, 1)
    assert finding.problems == [
        "text: document 3, tokens 2 to 3, read again in step 2, in epoch 2",
        "text: document 3, tokens 4 to 4, not read in epoch 2",
    ]


def test_a_torn_file_ends_before_the_tear_and_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    made, file = records("concat"), AuditFile(tmp_path / NAME)
    for record in made:
        file.append(packed(record))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-3])
    assert len(list(file.frames())) == len(made) - 1
    source, last = file.resume_at(7)
    assert isinstance(source, AuditSource)
    assert source.documents.tolist() == DOCUMENTS
    assert isinstance(last, AuditRows)
    assert last.step == 7
    file.append(b"".join(map(packed, made[8:])))
    assert file.path.read_bytes() == whole


def test_rows_that_were_passed_over_on_purpose_are_no_gap(tmp_path: Path) -> None:
    made = records("concat")
    over = made[3]
    assert isinstance(over, AuditRows)
    later = [r._replace(step=r.step - 1) for r in made[4:] if isinstance(r, AuditRows)]
    proof = proof_of(tmp_path, [*made[:3], over._replace(passed=True), *later])
    assert proof.holds, proof.table()
    assert proof.findings[0].passed == over.pieces[:, 3].sum()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 8, 11])
def test_what_is_left_of_an_epoch_completes_it(tmp_path: Path, packing: str, step: int) -> None:
    """Amid an epoch and amid a segment, whose rows come in an order of their own; later steps may be in the audit."""
    streams, made = two_segments(packing), records(packing, steps=11)
    state = streams[0].state(step * ROWS) if step <= 4 else streams[1].state((step - 4) * ROWS)
    save(tmp_path, step, json.loads(json.dumps(state)))
    proof = proof_of(tmp_path, made)
    assert proof.holds, proof.table()
    read = sum(int(r.pieces[:, 3].sum()) for r in made[1 : step + 1] if isinstance(r, AuditRows))
    assert (proof.goes_on, proof.findings[0].left) == (step, -read % 92)
    assert f"is what the run reads after step {step}" in proof.table()[-1]


ELSEWHERE: dict[str, tuple[int, str]] = {
    "a row that no step has read": (1, "not read until step 8, nor left to be read, in epoch 5"),
    "a row that was read": (-1, "read until step 8 and to be again, in epoch 5"),
    "rows up to the next epoch": (6, "in epoch 5 until step 8, then in 6"),
}


@pytest.mark.parametrize("fault", ELSEWHERE)
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_run_that_goes_on_elsewhere_is_found_before_the_epoch_is_over(
    tmp_path: Path, packing: str, fault: str
) -> None:
    rows, said = ELSEWHERE[fault]
    (_, stream), made = two_segments(packing), records(packing, steps=8)
    assert proof_of(tmp_path, made).table()[-1].startswith("no checkpoint tells what is left")
    assert proof_of(tmp_path, made).holds
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)  # half written
    save(tmp_path, 8, stream.state(4 * ROWS + rows))
    proof = proof_of(tmp_path, made)
    assert not proof.holds
    assert said in "\n".join(proof.table())


@pytest.mark.parametrize("kept", [0, 5, 7])
def test_a_file_without_the_last_steps_before_a_checkpoint_proves_nothing(tmp_path: Path, kept: int) -> None:
    """An empty file too, which no rank of a run that has saved can have left."""
    (_, stream), made = two_segments("concat"), records("concat", steps=8)
    save(tmp_path, 8, stream.state(4 * ROWS))
    proof = proof_of(tmp_path, made[: kept + 1] if kept else [])
    assert not proof.holds
    assert f"steps {kept + 1} to 8 are not in the audit" in proof.table()[-1]
    assert proof_of(tmp_path, made).holds


def test_a_damaged_checkpoint_says_nothing_of_the_steps_that_are_missing(tmp_path: Path) -> None:
    """A run that has passed over it, and has not come to its step again, has an audit that holds."""
    later = stored_checkpoints.store(tmp_path / "checkpoints", 14)
    assert not proof_of(tmp_path, records("concat")).holds
    stored_checkpoints.flipped(later)
    assert proof_of(tmp_path, records("concat")).holds


@pytest.mark.slow
def test_the_command_says_it_and_its_status_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longreach.launch.audit", f"run={tmp_path}"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run().returncode == 1
    assert proof_of(tmp_path, records("concat")).holds
    good = run()
    assert good.returncode == 0, good.stderr
    assert "12 steps" in good.stdout
    proof_of(tmp_path, without(records("concat")))
    bad = run()
    assert bad.returncode == 1
    assert "not read in epoch 1" in bad.stdout
