"""The ledger of faults: rows in which a run died twice alike, or from which it went back, are passed over."""

import io
import itertools
import json
from pathlib import Path

import pytest

from longreach.trainer.faults.ledger import Ledger, Passage, beyond


def test_steps_begin_where_no_row_of_theirs_is_passed_over() -> None:
    passages = [Passage(4, 6, ""), Passage(9, 10, ""), Passage(6, 7, "")]
    bad = {4, 5, 6, 9}
    for row, count in itertools.product(range(14), (1, 2, 3)):
        free = next(first for first in itertools.count(row) if not bad & set(range(first, first + count)))
        got = beyond(row, count, passages)
        assert not bad & set(range(got, got + count))
        assert got >= free
        assert got == row or got in (6, 7, 10)  # no row is left out but those before a passage that are too few
    assert beyond(3, 2, passages) == 7
    assert beyond(7, 2, passages) == 7
    assert beyond(7, 3, passages) == 10


def test_what_happened_once_is_met_again_and_what_happened_twice_is_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.passages() == []
    ledger.add("died", 3, (4, 6), "RuntimeError")
    ledger.add("died", 3, (4, 6), "OutOfMemoryError")
    ledger.add("died", 7, (12, 14), "RuntimeError")
    ledger.add("skipped", 8, (14, 16), "the gradient is not finite", documents=[[1], [2, 3]])
    assert ledger.passages() == []
    with ledger.path.open("a") as file:
        file.write('{"kind": "died", "st\n[]\n')  # torn when a run was killed
    Ledger(tmp_path).add("died", 3, (4, 6), "RuntimeError")
    assert ledger.passages() == [Passage(4, 6, "the run died there 2 times: RuntimeError")]
    ledger.add("rollback", 9, (0, 3), "10 steps in a row were skipped", to=1)
    assert [tuple(passage)[:2] for passage in ledger.passages()] == [(0, 3), (4, 6)]
    kinds = [json.loads(line)["kind"] for line in ledger.path.read_text().splitlines() if line.endswith("}")]
    assert kinds == ["died", "died", "died", "skipped", "died", "rollback"]


def test_half_a_line_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a loss of power has torn, without its end, and one that the disk had room for a part of."""
    ledger = Ledger(tmp_path)
    ledger.add("rollback", 9, (0, 3), "alike")
    with ledger.path.open("a") as file:
        file.write('{"kind": "rollback", "st')
    ledger.add("rollback", 12, (8, 10), "alike")
    whole, opened = ledger.path.read_bytes(), Path.open

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(data[:20])

    def fill(path: Path, mode: str, **_: object) -> io.FileIO:
        return Full(path, mode)

    monkeypatch.setattr(Path, "open", fill)
    ledger.add("rollback", 15, (20, 30), "alike")
    monkeypatch.setattr(Path, "open", opened)
    assert ledger.path.read_bytes() == whole
    ledger.add("rollback", 18, (40, 50), "alike")
    assert [passage[:2] for passage in ledger.passages()] == [(0, 3), (8, 10), (40, 50)]


def test_rows_of_another_segment_are_others(tmp_path: Path) -> None:
    """Also within a stage; lines from before segments were named are of their stage."""
    for segment in ("a", "a", "b"):
        Ledger(tmp_path, segment, "long").add("died", 3, (4, 6), "RuntimeError")
    for _ in range(2):
        Ledger(tmp_path, stage="long").add("died", 3, (8, 9), "RuntimeError")
    rows = [
        [passage[:2] for passage in Ledger(tmp_path, *of).passages()] for of in (("a", "long"), ("b", "long"), ("a",))
    ]
    assert rows == [[(4, 6), (8, 9)], [(8, 9)], [(4, 6)]]


def test_a_folder_that_cannot_be_written_costs_the_line_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gone")
    ledger.add("died", 3, (4, 6), "RuntimeError")
    assert ledger.passages() == []
    assert not (tmp_path / "gone").exists()
