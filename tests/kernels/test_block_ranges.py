"""Lists of blocks against the dense mask: nothing visible is left out, nothing is listed twice, whole means whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.masks.block_ranges import key_ranges, query_ranges
from longreach.parallel.layout import Layout

MASKS = [Mask(), Mask(causal=False), Mask(window=1), Mask(window=9), Mask(window=9, sink_tokens=3), Mask(window=40)]


def covered(ranges, blocks, other_blocks):
    """int `[blocks, other_blocks]` of the whole and of the masked ranges: how often each is listed."""
    counts = torch.zeros(2, blocks, other_blocks, dtype=torch.int64)
    for n in range(blocks):
        for kind in range(2):
            first, last = ranges.offsets[2 * n + kind : 2 * n + kind + 2].tolist()
            for start, stop in ranges.bounds[first:last].tolist():
                counts[kind, n, start:stop] += 1
    return counts


def check(mask, queries, keys, block, other):
    tile = mask.tile(queries, keys)
    if tile is None:
        return
    dense = mask.dense(queries, keys)
    for listed, seen in (
        (key_ranges(tile, block, other), dense),
        (query_ranges(tile, block, other), dense.transpose(1, 2)),
    ):
        batch, n, m = seen.shape
        blocks, others = -(-n // block), -(-m // other)
        some = torch.zeros(batch, blocks, others, dtype=torch.bool)
        every = torch.zeros_like(some)
        for b in range(batch):
            for i in range(blocks):
                for j in range(others):
                    part = seen[b, i * block : (i + 1) * block, j * other : (j + 1) * other]
                    some[b, i, j], every[b, i, j] = part.any(), part.all() and part.shape[1] == other
        whole, masked = covered(listed, batch * blocks, others)
        assert torch.equal((whole + masked) == 1, some.flatten(0, 1))
        assert int((whole + masked).max()) == 1
        assert not (whole.bool() & ~every.flatten(0, 1)).any()
        if queries.is_whole and not mask.sink_tokens:  # then every block that could go without a mask does
            assert torch.equal(whole.bool(), every.flatten(0, 1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("block", "other"), [(16, 8), (8, 16), (8, 8)])
def test_ranges_of_whole_and_packed_rows(mask, block, other):
    check(mask, *[Documents.whole(2, 61)] * 2, block, other)
    check(mask, *[Documents.from_lengths([[3, 30, 1, 20], [50]], 60)] * 2, block, other)
    check(mask, Documents.whole(1, 30, position=40), Documents.whole(1, 70), block, other)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    mask=st.sampled_from(MASKS),
    spans=st.integers(1, 3),
    pair=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_ranges_of_the_tiles_of_a_ring(lengths, mask, spans, pair):
    total = -(-sum(lengths) // (2 * spans)) * 2 * spans
    documents = Documents.from_lengths([lengths], total)
    layout = Layout(total, ranks=2, spans=spans)
    check(mask, layout.documents(documents, pair[0]), layout.documents(documents, pair[1]), 8, 4)


def test_lists_grow_with_the_blocks_and_are_kept():
    documents = Documents.whole(1, 1 << 20)
    tile = Mask().tile(documents, documents)
    ranges = key_ranges(tile, 128, 64)
    assert ranges.bounds.shape[0] < 3 * 8192
    assert key_ranges(tile, 128, 64).bounds is ranges.bounds
