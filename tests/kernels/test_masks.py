"""Masks: the predicate, its closed-form counts and intervals, and the cutting of blocks into tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents, Run, Runs
from longreach.kernels.masks import Band, Bands, BlockLocal, Dilated, Mask, Pattern
from longreach.kernels.plain import made_of

masks = st.one_of(
    st.just(Mask()),
    st.just(Mask(causal=False)),
    st.builds(lambda window, sinks: Mask(window=window, sink_tokens=sinks), st.integers(1, 12), st.integers(0, 5)),
    st.builds(Dilated, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 12))),
    st.builds(BlockLocal, st.integers(1, 12)),
    st.just(Bands((Band(back=3, ahead=2), Band(ahead=-4, stride=3)))),  # both sides nearby, every third far behind
    st.just(Bands((Band(back=6, ahead=6, stride=2, block=7), Band(first=2, back=9, ahead=-7, block=10)))),
)
runs = st.builds(lambda length, position: Run(0, 0, length, position), st.integers(1, 15), st.integers(0, 20))
rows_of_lengths = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=3)


def runs_of(run: Run) -> Runs:
    return Runs(*torch.tensor([[0], *([number] for number in run)]))


def seen(mask: Pattern, i: int, j: int) -> bool:
    """The definition, one pair at a time."""
    if isinstance(mask, Dilated):
        return i >= j and (i - j) % mask.dilation == 0 and (mask.window is None or i - j < mask.window)
    if isinstance(mask, BlockLocal):
        return i >= j and i // mask.block == j // mask.block
    if isinstance(mask, Bands) and mask.bands[0].block == 7:
        return (i // 7 == j // 7 and (i - j) % 2 == 0) or (j >= 2 and 7 <= i - j <= 9 and i // 10 == j // 10)
    if isinstance(mask, Bands):
        return -2 <= i - j <= 3 or (i - j >= 4 and (i - j) % 3 == 0)
    if not mask.causal:
        return True
    if mask.window is None:
        return j <= i
    return 0 <= i - j < mask.window or (j <= i and j < mask.sink_tokens)


@given(masks, runs, runs)
def test_pairs_in_closed_form(mask, query, key):
    i = range(query.position, query.end_position)
    j = range(key.position, key.end_position)
    assert int(mask.pairs(runs_of(query), runs_of(key))) == sum(seen(mask, a, b) for a in i for b in j)
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
    if tile is not None:
        assert torch.equal(tile.pieces.queries.document, tile.pieces.keys.document)
        assert (mask.pairs(*tile.pieces) > 0).all()
    half = documents.length // 2
    cut = [documents.slice(0, half), documents.slice(half, 2 * half)]
    reached = [[mask.reaches(one, other) for other in cut] for one in cut]
    assert mask.reached(Documents.stack(cut), 2).tolist() == reached


@given(masks, st.integers(0, 25), st.integers(1, 9))
def test_intervals_hold_what_some_and_what_all_see(mask, start, length):
    stop, positions = start + length, range(40)
    bounds = torch.tensor([start]), torch.tensor([stop])
    for intervals, sees in (
        (mask.keys_of(*bounds), lambda own, other: seen(mask, own, other)),
        (mask.queries_of(*bounds), lambda own, other: seen(mask, other, own)),
    ):
        some, every = ({p for a, b in each for p in positions if a <= p < b} for each in intervals)
        own = range(start, stop)
        assert {p for p in positions if any(sees(o, p) for o in own)} <= some
        assert every <= {p for p in positions if all(sees(o, p) for o in own)}
        if isinstance(mask, Mask):  # a band without a stride: nothing is given away
            assert every == {p for p in positions if all(sees(o, p) for o in own)}


@given(masks, st.integers(0, 30), st.integers(0, 20), st.integers(0, 20))
def test_counts_of_keys_and_what_a_cache_keeps(mask, i, start, length):
    keys = torch.tensor([start]), torch.tensor([start + length])
    expected = sum(seen(mask, i, j) for j in range(start, start + length))
    assert mask.count(torch.tensor([i]), *keys).tolist() == [expected]
    kept = {p for a, b in mask.kept(start) for p in range(a, b)}
    assert {j for j in range(start) for later in range(start, start + 40) if seen(mask, later, j)} <= kept
    assert kept <= set(range(start))


def test_a_pattern_is_made_again_of_its_settings():
    for mask in (Mask(window=3, sink_tokens=1), Dilated(2, window=7), BlockLocal(5), Bands((Band(back=3),))):
        assert made_of(mask.settings) == mask


def test_bad_masks():
    with pytest.raises(ValueError, match="window must be at least 1"):
        Mask(window=0)
    with pytest.raises(ValueError, match="causal=True"):
        Mask(causal=False, window=3)
    with pytest.raises(ValueError, match="must not be negative"):
        Mask(window=3, sink_tokens=-1)
    with pytest.raises(ValueError, match="with a window"):
        Mask(sink_tokens=2)
    with pytest.raises(ValueError, match="dilation must be at least 1"):
        Dilated(0)
    with pytest.raises(ValueError, match="block must be at least 1"):
        BlockLocal(0)
    for bands in ((Band(back=3), Band(back=5, ahead=0)), (Band(ahead=0, stride=2), Band(back=9, ahead=0, stride=3))):
        with pytest.raises(ValueError, match="must not share a pair"):
            Bands(bands)
    Bands((Band(last=4, ahead=0), Band(first=4, back=7, ahead=0), Band(first=4, ahead=-9, stride=3)))
