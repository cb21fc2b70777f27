"""Mixtures: exact weights after any number of rows, and each source once an epoch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.trainer.data.packing import TokenStream
from longreach.trainer.data.streams.mixture import MixtureStream, Shares


class Texts:
    def __init__(self, lengths: list[int], base: int) -> None:
        self.lengths, self.base = np.array(lengths, np.int64), base

    def __getitem__(self, document: int) -> np.ndarray:
        return self.base + 100 * document + np.arange(self.lengths[document])


def mixture(
    weights: dict[str, float], length: int = 8, packing: str = "concat", changed: tuple[str, ...] = ()
) -> MixtureStream:
    sources = {
        name: TokenStream(
            Texts([3 + k, 17, 9 + 2 * k, 4], 10_000 * k),
            np.arange(4),
            length=length,
            seed=1,
            fingerprint=name + "changed" * (name in changed),
            packing=packing,
            name=name,
        )
        for k, name in enumerate(sorted({"a", "b", "c"} & set(weights)))
    }
    return MixtureStream(sources, weights)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_after_any_number_of_rows_each_source_has_its_share(parts: list[int]) -> None:
    shares = Shares({f"s{k}": part for k, part in enumerate(parts)})
    total, counts = sum(parts), [0] * len(parts)
    for row in range(2 * shares.period + 5):
        assert [shares.count(k, row) for k in range(len(parts))] == counts
        for count, part in zip(counts, parts, strict=True):
            assert abs(count - Fraction(row * part, total)) < 1
        counts[shares.source(row)] += 1


def test_weights_are_exact_whatever_their_sum() -> None:
    shares = Shares({"code": 0.7, "books": 0.3})
    assert shares.period == 10
    assert [shares.count(k, 10**12) for k in range(2)] == [7 * 10**11, 3 * 10**11]
    assert Shares({"a": 2, "b": 4}).period == 3


@pytest.mark.parametrize(("weights", "said"), [({"a": 0}, "more than 0"), ({"a": 0.1234567, "b": 1}, "fewer digits")])
def test_weights_that_cannot_be_kept_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Shares(weights)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_source_is_read_in_its_own_order(packing: str) -> None:
    made = mixture({"a": 0.5, "b": 0.3, "c": 0.2}, packing=packing)
    alone = {
        name: TokenStream(stream.documents, stream.members, length=8, seed=1, fingerprint=name, packing=packing)
        for name, stream in zip(made.names, made.sources, strict=True)
    }
    counts = dict.fromkeys(alone, 0)
    for number in range(60):
        name = made.names[made.source(number)]
        np.testing.assert_array_equal(made.row(number).tokens, alone[name].row(counts[name]).tokens)
        assert made.pieces(number) == alone[name].pieces(counts[name])
        counts[name] += 1
    parts = {part.name: part for part in made.parts(60)}
    assert {name: part.rows for name, part in parts.items()} == {"a": 30, "b": 18, "c": 12}
    assert parts["a"].epochs == parts["a"].tokens / made.sources[0].tokens


def test_a_mixture_changes_between_segments_and_no_token_is_lost() -> None:
    first, read = mixture({"a": 0.5, "b": 0.5}), {}
    second, third = mixture({"a": 0.25, "c": 0.75}, length=5, packing="best_fit"), mixture({"b": 0.9, "a": 0.1}, 7)
    first.begin(8)
    state = first.state(8)
    for made, rows in ((first, 8), (second, 11), (third, 200)):
        if made is not first:
            made.follow(state, rows)
        for number in range(rows):
            row = made.row(number)
            read.setdefault(made.names[made.source(number)], []).extend(row.tokens[: sum(row.lengths)].tolist())
        state = made.state(rows)
    for source in first.sources:
        tokens, total = read[source.name], source.tokens
        every = sorted(int(t) for d in range(4) for t in source.documents[d])
        assert len(tokens) > total
        for start in range(0, len(tokens) - total, total):
            assert sorted(tokens[start : start + total]) == every
    # Sources that only an earlier segment had are remembered too.
    assert set(state["read"]) == {"a", "b", "c"}


def test_other_weights_or_data_are_another_mixture() -> None:
    made = mixture({"a": 0.5, "b": 0.5})
    assert mixture({"b": 1, "a": 1}).resume(made.state(9)) == 9
    for other in (mixture({"a": 0.6, "b": 0.4}), mixture({"a": 0.5, "b": 0.5}, changed=("b",))):
        with pytest.raises(ValueError, match=r"data\.restart=true"):
            other.resume(made.state(9))
        assert other.resume(made.state(9), restart=True) == 0
        assert other.parts(0)[0].rows == made.parts(9)[0].rows  # what has not changed goes on where it was


def test_a_source_may_not_be_there_twice() -> None:
    stream = mixture({"a": 1}).sources[0]
    with pytest.raises(ValueError, match="hold the same documents"):
        MixtureStream({"a": stream, "b": stream}, {"a": 1, "b": 1})
