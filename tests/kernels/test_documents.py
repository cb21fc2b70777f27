"""Documents: runs, and what is derived from them, against token-by-token bookkeeping."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import PADDING, Documents, Run

rows_of_lengths = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=3)


def tokens(documents: Documents) -> list[list[tuple[int, int]]]:
    """(document, position) of every token, from the tensors."""
    ids, positions = documents.ids(), documents.positions()
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), positions.tolist(), strict=True)]


def expected(rows: list[list[int]], length: int) -> list[list[tuple[int, int]]]:
    packed = [[(d, i) for d, n in enumerate(row) for i in range(n)] for row in rows]
    return [row + [(PADDING, 0)] * (length - len(row)) for row in packed]


@given(rows_of_lengths, st.integers(0, 4))
def test_ids_and_positions_of_packed_rows(rows, padding):
    length = max(sum(row) for row in rows) + padding
    documents = Documents.from_lengths(rows, length)
    assert documents.batch == len(rows)
    assert documents.length == length
    assert tokens(documents) == expected(rows, length)
    assert documents.ids().dtype == documents.positions().dtype == torch.int32


@given(rows_of_lengths, st.data())
def test_a_slice_keeps_ids_and_positions(rows, data):
    documents = Documents.from_lengths(rows)
    start = data.draw(st.integers(0, documents.length))
    stop = data.draw(st.integers(start, documents.length))
    cut = documents.slice(start, stop)
    assert tokens(cut) == [row[start:stop] for row in tokens(documents)]
    first = [row[0] if row else (PADDING, 0) for row in tokens(cut)]
    assert cut.continues == tuple(document != PADDING and position > 0 for document, position in first)


@given(rows_of_lengths, st.integers(1, 9), st.integers(1, 4))
def test_spans_are_slices(rows, length, number):
    documents = Documents.from_lengths([row[:2] for row in rows], max(18, length * number) // length * length)
    spans = documents.spans(length)
    borders = range(0, documents.length, length)
    assert spans == Documents.stack([documents.slice(start, start + length) for start in borders])


@given(rows_of_lengths, st.lists(st.integers(0, 45), max_size=4))
def test_slices_put_together_again_are_the_whole(rows, cuts):
    documents = Documents.from_lengths(rows)
    borders = [0, *sorted(min(c, documents.length) for c in cuts), documents.length]
    parts = [documents.slice(a, b) for a, b in itertools.pairwise(borders)]
    assert Documents.concatenate(parts) == documents


@given(rows_of_lengths, st.data())
def test_parts_out_of_order_stay_runs_of_their_own(rows, data):
    documents = Documents.from_lengths(rows)
    middle = data.draw(st.integers(0, documents.length))
    swapped = Documents.concatenate([documents.slice(middle, documents.length), documents.slice(0, middle)])
    assert tokens(swapped) == [row[middle:] + row[:middle] for row in tokens(documents)]
    for row in swapped.runs:
        stops = [0] + [run.stop for run in row]
        assert [run.start for run in row] == stops[:-1]
        assert stops[-1] == swapped.length


def test_neighbouring_documents_with_one_id_and_no_joint_position_do_not_merge():
    part = Documents.whole(1, 4)
    joined = Documents.concatenate([part, part])
    assert joined.runs == ((Run(0, 0, 4, 0), Run(0, 4, 4, 0)),)


def test_rows_and_stack_are_inverse():
    documents = Documents.from_lengths([[3, 2], [5], [1]])
    assert Documents.stack([documents.rows(0, 1), documents.rows(1, 3)]) == documents
    with pytest.raises(ValueError, match="one length"):
        Documents.stack([Documents.whole(1, 3), Documents.whole(1, 4)])


def test_whole_rows():
    assert Documents.whole(2, 5).is_whole
    assert Documents.whole(2, 5, position=7).continues == (True, True)
    assert Documents.whole(1, 3, position=7).positions().tolist() == [[7, 8, 9]]
    assert not Documents.from_lengths([[2, 3]]).is_whole
    assert Documents.whole(1, 0).runs == ((),)


def test_tensors_are_made_once_a_device():
    documents = Documents.whole(1, 3)
    assert documents.ids() is documents.ids("cpu")


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1"):
        Documents.from_lengths([[3, 0]])
    with pytest.raises(ValueError, match="at most length=4"):
        Documents.from_lengths([[3, 2]], 4)
    with pytest.raises(ValueError, match=r"within 0\.\.5"):
        Documents.whole(1, 5).slice(2, 6)
