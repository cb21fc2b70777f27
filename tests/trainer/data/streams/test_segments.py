"""Segments of a run: every token once an epoch, whatever lengths, packings and marks follow one another."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.trainer.data.packing import NO_TARGET, TokenStream
from longreach.trainer.data.streams.best_fit import pack


class Texts:
    """Documents of known ids: token t of document d is 1000 (d + 1) + t."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)

    def __getitem__(self, document: int) -> np.ndarray:
        return 1000 * (document + 1) + np.arange(self.lengths[document])


def stream(lengths: list[int], length: int, packing: str, seed: int | None = 3) -> TokenStream:
    return TokenStream(
        Texts(lengths), np.arange(len(lengths)), length=length, seed=seed, fingerprint="f", packing=packing
    )


def tokens(made: TokenStream, number: int) -> list[int]:
    row = made.row(number)
    return row.tokens[: sum(row.lengths)].tolist()


def assert_once_an_epoch(lengths: list[int], read: list[int]) -> None:
    """Of what was read, in order, each epoch's worth of tokens is every token once, and the rest repeats none."""
    every = Counter(1000 * (d + 1) + t for d, n in enumerate(lengths) for t in range(n))
    total = sum(lengths)
    for start in range(0, len(read), total):
        epoch = Counter(read[start : start + total])
        if len(read) - start >= total:
            assert epoch == every
        else:
            assert max(epoch.values()) == 1


lengths_strategy = st.lists(st.integers(2, 40), min_size=1, max_size=14)
segment_strategy = st.tuples(
    st.integers(1, 50), st.sampled_from(["concat", "best_fit"]), st.none() | st.integers(1, 30), st.integers(0, 30)
)


@settings(deadline=None, max_examples=150)
@given(lengths=lengths_strategy, seed=st.integers(0, 2**64 - 1), segments=st.lists(segment_strategy, max_size=4))
def test_segments_neither_repeat_nor_lose_a_token(
    lengths: list[int], seed: int, segments: list[tuple[int, str, int | None, int]]
) -> None:
    read: list[int] = []
    state: dict[str, Any] | None = None
    for length, packing, mark, rows in [*segments, (7, "concat", None, 2 + 2 * sum(lengths) // 7)]:
        made = stream(lengths, length, packing, seed)
        made.begin(mark) if state is None else made.follow(state, mark)
        for number in range(rows):
            read += tokens(made, number)
        (part,) = made.parts(rows)
        assert part.tokens == len(read)
        state = made.state(rows)
    assert_once_an_epoch(lengths, read)


@settings(deadline=None, max_examples=80)
@given(lengths=lengths_strategy, length=st.integers(1, 50), mark=st.none() | st.integers(1, 30))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths: list[int], length: int, mark: int | None) -> None:
    made = stream(lengths, length, "best_fit")
    made.begin(mark)
    for number in range(40):
        row, pieces = made.row(number), made.pieces(number)
        assert 0 < sum(row.lengths) <= length
        assert [piece.tokens for piece in pieces] == row.lengths
        for document, first, n in pieces:
            if lengths[document] <= length:
                assert (first, n) == (0, lengths[document])
            else:
                assert n == length or first + n == lengths[document]
        at = 0
        for document, first, n in pieces:
            ids = made.documents[document]
            assert row.tokens[at : at + n].tolist() == ids[first : first + n].tolist()
            assert row.targets[at : at + n].tolist() == [*ids[first + 1 : first + n + 1].tolist(), NO_TARGET][:n]
            at += n
        assert (row.targets[at:] == NO_TARGET).all()


def best_fit_decreasing(sizes: list[int], length: int) -> list[int]:
    """The rooms that are left, one piece after another, as it is written."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(length - size)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(length=st.integers(1, 30), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_packing_in_groups_is_best_fit_decreasing(length: int, sizes: list[int]) -> None:
    sizes = [min(size, length) for size in sizes]
    rows, count = pack(np.array(sizes, np.int64), length)
    filled = np.bincount(rows, sizes, count)
    assert sorted((length - filled).tolist()) == best_fit_decreasing(sizes, length)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_at_a_mark_whole_documents_have_been_read(packing: str) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 90, 60)]
    made = stream(lengths, 32, packing)
    made.begin(20)
    read = Counter(piece.document for number in range(20) for piece in made.pieces(number))
    unread = made._plan.after(20)
    left = {
        piece.document
        for a, b in zip(unread.starts[:-1], unread.stops[:-1], strict=True)
        for piece in made.epochs.pieces(int(a), int(b - a))
    }
    order = made.epochs.table(0).order.tolist()
    last = max(order.index(document) for document in read)
    if packing == "concat":
        assert not left  # what is unread is all that comes after
        assert set(order[:last]) <= set(read)
    else:
        assert sum(lengths[document] for document in left) <= 32 * 3
        assert set(order[: last + 1]) == set(read) | left


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("mark", [None, 9])
def test_a_resumed_segment_goes_on(packing: str, mark: int | None) -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(2, 90, 40)]
    before = stream(lengths, 16, "concat")
    made = stream(lengths, 40, packing)
    made.follow(before.state(23), mark)
    again = stream(lengths, 40, packing)
    assert again.resume(made.state(5)) == 5
    for number in range(5, 60):
        np.testing.assert_array_equal(again.row(number).tokens, made.row(number).tokens)


def test_what_was_read_under_another_seed_is_refused() -> None:
    state = stream([6, 3], 4, "concat", seed=3).state(1)
    with pytest.raises(ValueError, match="seed"):
        stream([6, 3], 8, "concat", seed=4).follow(state)


def test_new_data_are_refused_unless_they_are_meant() -> None:
    old, new = stream([6, 3], 4, "concat"), stream([6, 3, 5], 4, "concat")
    new.fingerprint = "g"
    with pytest.raises(ValueError, match=r"data\.restart=true"):
        new.resume(old.state(2))
    assert new.resume(old.state(2), restart=True) == 0
    assert new.state(0)["read"] == {"f": [[4, "concat", None, 2]]}
    assert new.resume(new.state(1), restart=True) == 1  # the same command once more goes on
    # What it has read of the old data counts where these come back.
    back = stream([6, 3], 4, "concat")
    back.follow(new.state(1))
    assert_once_an_epoch([6, 3], tokens(old, 0) + tokens(old, 1) + tokens(back, 0) + tokens(back, 1))


def test_states_from_before_there_were_segments_are_understood() -> None:
    made = stream([6, 3], 4, "concat")
    old = {"version": 2, "fingerprint": "f", "sequence_length": 4, "seed": 3, "row": 2}
    assert made.resume(old) == 2
    after = stream([6, 3], 5, "best_fit")
    after.follow(old)
    assert_once_an_epoch([6, 3], tokens(made, 0) + tokens(made, 1) + tokens(after, 0) + tokens(after, 1))
