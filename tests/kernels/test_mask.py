"""Mask: the predicate, its closed-form counts, and the cutting of blocks into tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents, Run
from longreach.kernels.mask import Mask

masks = st.one_of(
    st.just(Mask()),
    st.just(Mask(causal=False)),
    st.builds(lambda window, sinks: Mask(window=window, sink_tokens=sinks), st.integers(1, 12), st.integers(0, 5)),
)
runs = st.builds(lambda length, position: Run(0, 0, length, position), st.integers(1, 15), st.integers(0, 20))
rows_of_lengths = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=3)


def seen(mask: Mask, i: int, j: int) -> bool:
    """The definition, one pair at a time."""
    if not mask.causal:
        return True
    if mask.window is None:
        return j <= i
    return 0 <= i - j < mask.window or (j <= i and j < mask.sink_tokens)


@given(masks, runs, runs)
def test_pairs_in_closed_form(mask, query, key):
    i = range(query.position, query.end_position)
    j = range(key.position, key.end_position)
    assert mask.pairs(query, key) == sum(seen(mask, a, b) for a in i for b in j)
    visible = mask.visible(torch.tensor(list(i)), torch.tensor(list(j)))
    assert visible.tolist() == [[seen(mask, a, b) for b in j] for a in i]


@given(masks, rows_of_lengths, st.data())
def test_the_dense_mask_and_the_tile_of_a_part_against_a_part(mask, rows, data):
    documents = Documents.from_lengths(rows, max(sum(row) for row in rows) + 2)
    parts = []
    for _ in range(2):
        start = data.draw(st.integers(0, documents.length))
        parts.append(documents.slice(start, data.draw(st.integers(start, documents.length))))
    queries, keys = parts
    dense = mask.dense(queries, keys)
    for b in range(documents.batch):
        q_tokens = list(zip(queries.ids()[b].tolist(), queries.positions()[b].tolist(), strict=True))
        k_tokens = list(zip(keys.ids()[b].tolist(), keys.positions()[b].tolist(), strict=True))
        by_pair = [[d == e != -1 and seen(mask, i, j) for e, j in k_tokens] for d, i in q_tokens]
        assert dense[b].tolist() == by_pair
    tile = mask.tile(queries, keys)
    assert (0 if tile is None else tile.pairs) == int(dense.sum())
    assert mask.reaches(queries, keys) == (tile is not None) == bool(dense.any())
    for piece in tile.pieces if tile else ():
        assert piece.query.document == piece.key.document
        assert mask.pairs(piece.query, piece.key) > 0


def test_square_causal_tiles_are_recognised():
    whole, packed = Documents.whole(2, 6), Documents.from_lengths([[2, 4], [6]])
    assert Mask().tile(whole, whole).is_square_causal
    assert not Mask().tile(packed, packed).is_square_causal
    assert not Mask(window=2).tile(whole, whole).is_square_causal
    assert not Mask().tile(Documents.whole(2, 6, position=1), whole).is_square_causal


def test_bad_masks():
    with pytest.raises(ValueError, match="window must be at least 1"):
        Mask(window=0)
    with pytest.raises(ValueError, match="causal=True"):
        Mask(causal=False, window=3)
    with pytest.raises(ValueError, match="must not be negative"):
        Mask(window=3, sink_tokens=-1)
    with pytest.raises(ValueError, match="with a window"):
        Mask(sink_tokens=2)
