"""Lines that survive kills and full disks, and meters against what they count."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.parallel.layout import Layout
from longreach.trainer.evaluation.maps import draw_task_maps
from longreach.trainer.run.metrics import MetricsFile, Work, attention_pairs, peak_flops, peak_memory_bytes, work_of
from longreach.trainer.run.plots import POINTS, Curve, LossCurves, smoothed


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0 / step})
    file.write({"step": 4, "validation_loss": 2.0})
    with path.open("a") as end:
        end.write('{"step": 3, "lo')
    before = path.read_text().splitlines()
    said: list[dict[str, float]] = []
    MetricsFile(path).resume_at(4, said.append)
    assert path.read_text().splitlines() == [*before[:4], before[5]]
    assert said == [json.loads(line) for line in [*before[:4], before[5]]]
    MetricsFile(path).resume_at(0)
    assert path.read_text() == ""
    MetricsFile(tmp_path / "absent.jsonl").resume_at(3)


def test_lines_that_the_disk_refused_come_later_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = MetricsFile(folder / "metrics.jsonl")
    with pytest.raises(OSError, match="No such file"):
        file.write({"step": 1})
    folder.mkdir()
    file.write({"step": 2})
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "note": "x" * 40})
    size = file.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # room for part of a line
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="No space left"):
                file.write({"step": step, "note": "y" * 40})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.stat().st_size == size
    file.write({"step": 4})
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "grad_norm": math.inf})
    assert json.loads(file.path.read_text(), parse_constant=pytest.fail) == {"step": 1, "grad_norm": None}


@pytest.mark.parametrize("spans", [1, 2, 4])
def test_attention_work_is_that_of_the_dense_mask(spans: int) -> None:
    documents = Documents.from_lengths([[5, 30, 13], [40]], 48)
    layout = Layout(48, 3, spans)
    dense = Mask().dense(documents, documents)
    expected = [int(layout.shard(dense, rank).sum()) for rank in range(3)]
    assert attention_pairs(documents, layout) == expected
    work = work_of(documents, 80, layout, 7)
    assert work.imbalance == pytest.approx(max(expected) / (sum(expected) / 3))
    assert (work.tokens, work.places) == (88, 96)
    assert work.padding == pytest.approx(8 / 96)


@st.composite
def shared_rows(draw: st.DrawFn) -> tuple[Documents, Layout]:
    """Packed rows, whose first document may have begun before and whose end may be padding, and who holds them."""
    ranks, spans, behind = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 7))
    length = ranks * spans * draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths, left = [], draw(st.integers(0, behind + length))
        while left:
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        rows.append(lengths)
    return Documents.from_lengths(rows, behind + length).slice(behind, behind + length), Layout(length, ranks, spans)


@given(shared_rows())
def test_attention_work_is_that_of_every_ranks_tile(shared: tuple[Documents, Layout]) -> None:
    documents, layout = shared
    tiles = [Mask().tile(layout.documents(documents, rank), documents) for rank in range(layout.ranks)]
    assert attention_pairs(documents, layout) == [0 if tile is None else tile.pairs for tile in tiles]


def test_attention_work_does_not_cut_the_documents_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Layout, "documents")
    monkeypatch.delattr(Documents, "slice")
    lengths = [1 + (37 * i) % 180 for i in range(5689)]
    length = -(-sum(lengths) // 512) * 512
    documents, layout = Documents.from_lengths([lengths], length), Layout(length, 64, 8)
    work = work_of(documents, sum(lengths), layout, 0)
    assert work.mean * 64 == sum(n * (n + 1) // 2 for n in lengths)


def test_work_adds_up() -> None:
    total = Work(1, 2, 3, 4, 5.0, 6.0) + Work(10, 20, 30, 40, 50.0, 60.0)
    assert total.numbers == (11, 22, 33, 44, 55.0, 66.0)
    assert Work().imbalance == 1.0


def test_what_is_not_known_is_not_invented() -> None:
    assert peak_flops(torch.device("cpu"), "float32") is None
    assert peak_memory_bytes(torch.device("cpu")) > 10_000_000


def test_on_cuda_the_peak_is_that_since_it_was_last_told(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [300]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.__delitem__(slice(0, -1)))
    allocated.append(200)
    assert [peak_memory_bytes(torch.device("cuda")) for _ in range(2)] == [300, 200]


def test_the_plot_holds_both_curves(tmp_path: Path) -> None:
    curves = LossCurves()
    curves.draw(tmp_path / "empty.png")  # a run that ended before its first step
    for step in range(1, 50):
        curves.add({"step": step, "loss": 5.0 / step})
    for record in ({"step": 20, "loss": None}, {"step": 25, "validation_loss": 1.0}, {"step": 26, "loss": math.inf}):
        curves.add(record)
    assert [point.mean for point in curves.training.points] == [(step, 5.0 / step) for step in range(1, 50)]
    assert [point.mean for point in curves.validation.points] == [(25, 1.0)]
    curves.draw(tmp_path / "plots" / "loss.png")
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("steps", [POINTS, 2 * POINTS + 1, 30_000])
def test_a_curve_keeps_its_shape_and_its_spikes_in_bounded_memory(steps: int) -> None:
    values = [5 / (1 + step / 1000) for step in range(steps)]
    values[777] = 9.0
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, value)
        assert len(curve.points) <= POINTS
    assert len(curve.points) >= POINTS / 2
    sizes = [point.size for point in curve.points]
    assert set(sizes[:-1]) == {sizes[0]}
    assert sum(sizes) == steps
    first = 0
    for point in curve.points:
        part = values[first : first + point.size]
        step, mean = point.mean
        assert step == first + (point.size - 1) / 2
        assert mean == pytest.approx(sum(part) / len(part))
        assert (point.least, point.greatest) == (min(part), max(part))
        first += point.size


def test_smoothing_keeps_a_constant_and_lags_little() -> None:
    assert smoothed([(step, 2.0) for step in range(100)]) == [(step, pytest.approx(2.0)) for step in range(100)]
    line = smoothed([(step, float(step)) for step in range(400)])
    assert 380 < line[-1][1] < 399


def test_a_plot_does_not_bring_back_the_folder_of_a_run_that_has_gone(tmp_path: Path) -> None:
    gone = tmp_path / "run"
    line = {"task": "needle", "length": 64, "depth": 0.5, "accuracy": 1.0, "choice": None}
    for draw in (LossCurves().draw, lambda file: draw_task_maps([line], file.parent)):
        with pytest.raises(FileNotFoundError):
            draw(gone / "plots" / "loss.png")
    assert not gone.exists()
