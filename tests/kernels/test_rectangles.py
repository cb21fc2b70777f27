"""Tiling: rectangles cover every visible pair exactly once, and the work follows the visible pairs."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents, Run
from longreach.kernels.masks import Band, Bands, Mask
from longreach.kernels.masks import rectangles as tiling
from longreach.kernels.masks.rectangles import rectangles

masks = st.one_of(
    st.just(Mask()),
    st.just(Mask(causal=False)),
    st.builds(lambda window, sinks: Mask(window=window, sink_tokens=sinks), st.integers(1, 150), st.integers(0, 20)),
    st.builds(lambda back, ahead: Bands((Band(back=back, ahead=ahead),)), st.integers(0, 90), st.integers(0, 40)),
    st.just(Bands((Band(back=7, ahead=3), Band(back=60, ahead=-9)))),
    st.just(Bands((Band(first=5, back=20),))),
)


def cover(tile, limit=None):
    """How often each pair is computed and visible in its rectangle: int `[B, T, S]`."""
    count = torch.zeros(tile.queries.batch, tile.queries.length, tile.keys.length, dtype=torch.int64)
    for at in rectangles(tile, limit):
        n, m = at.queries[1] - at.queries[0], at.keys[1] - at.keys[0]
        assert n > 0
        assert m > 0
        behind = torch.arange(n)[:, None] - torch.arange(m)
        if at.shape == "full":
            visible = torch.ones(n, m, dtype=torch.bool)
        elif at.shape == "causal":
            assert n == m
            visible = behind >= 0
        elif at.hidden is not None:
            visible = ~at.hidden
        else:
            visible = (behind + at.lead >= 0) & (behind + at.lead < at.window)
        assert visible.any(-1).all(), "a query that sees nothing would have a log-sum-exp of nothing"
        if limit is not None and at.shape in ("full", "causal"):
            assert max(n, m) <= limit
        count[at.rows[0] : at.rows[1], at.queries[0] : at.queries[1], at.keys[0] : at.keys[1]] += visible
    return count


def documents_of(run):
    return Documents.of_runs(((run,),), run.length)


@given(
    masks,
    st.builds(lambda length, position: Run(0, 0, length, position), st.integers(1, 250), st.integers(0, 200)),
    st.builds(lambda length, position: Run(0, 0, length, position), st.integers(1, 250), st.integers(0, 200)),
    st.sampled_from([None, 7, 100]),
    st.sampled_from([0, tiling.NARROW]),
)
def test_a_run_against_a_run(mask, query, key, limit, narrow):
    queries, keys = documents_of(query), documents_of(key)
    tile = mask.tile(queries, keys)
    dense = mask.dense(queries, keys)
    if tile is None:
        assert not dense.any()
    else:
        with patch.object(tiling, "NARROW", narrow):  # so that small windows are cut like wide ones too
            assert torch.equal(cover(tile, limit), dense.long())


@given(masks, st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=4), st.sampled_from([None, 16]))
def test_packed_rows(mask, rows, limit):
    documents = Documents.from_lengths(rows, max(sum(row) for row in rows) + 1)
    tile = mask.tile(documents, documents)
    if tile is not None:
        assert torch.equal(cover(tile, limit), mask.dense(documents, documents).long())


def test_rows_packed_alike_share_their_rectangles():
    whole = Documents.whole(4, 50)
    (only,) = rectangles(Mask().tile(whole, whole))
    assert only == ((0, 4), (0, 50), (0, 50), "causal", 0, 0, None)
    mixed = Documents.from_lengths([[93, 74], [93, 74], [], [93, 74], [97]])
    assert [at.rows for at in rectangles(Mask().tile(mixed, mixed))] == [(0, 2)] * 2 + [(3, 4)] * 2 + [(4, 5)]


def test_short_documents_share_rectangles():
    documents = Documents.from_lengths([[3] * 40 + [70] + [9, 20, 30, 50]])
    tile = Mask().tile(documents, documents)
    assert [(at.queries, at.shape) for at in rectangles(tile)] == [
        ((0, 120), "packed"),
        ((120, 190), "causal"),
        ((190, 299), "packed"),
    ]


def area(tile):
    return sum(
        (at.rows[1] - at.rows[0]) * (at.queries[1] - at.queries[0]) * (at.keys[1] - at.keys[0])
        for at in rectangles(tile)
    )


@pytest.mark.parametrize("mask", [Mask(), Mask(window=1024), Mask(window=1024, sink_tokens=16), Mask(window=64)])
def test_the_work_follows_the_visible_pairs(mask):
    for lengths in ([16384], [1024] * 16, [128] * 128, [9000, 17, 3, 6000, 1364]):
        documents = Documents.from_lengths([lengths])
        tile = mask.tile(documents, documents)
        assert tile.pairs <= area(tile) <= 2 * tile.pairs
