"""Block-sparse attention against a loop over queries in float64: op, parts, what it touches, costs, errors."""

import math

import pytest
import torch
from block_lists import dense_attention, random_lists
from largest_tensor import LargestTensor

from longreach.kernels.attend import Gradient, merge
from longreach.kernels.block_sparse import (
    attend,
    attend_backward,
    block_sparse_attention,
    chunked,
    count_visits,
    flops,
    most_visits,
)
from longreach.kernels.blocks import BlockLayout, BlockTile
from longreach.kernels.documents import Documents
from longreach.kernels.masks import BlockLocal, Mask
from longreach.kernels.softmax import bytes_sent, softmax_attention, state_bytes
from longreach.parallel.layout import Layout

MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 9": Mask(window=9),
    "blocks of 11": BlockLocal(11),
    "window 7, 3 sinks": Mask(window=7, sink_tokens=3),
}
PACKINGS = {
    "1 token": Documents.whole(1, 1),
    "short tail": Documents.whole(2, 35),
    "packed": Documents.from_lengths([[3, 17, 1, 20], [30, 5]], 43),
    "all padding": Documents.from_lengths([[7], []], 7),
}
BACKENDS = ["chunked", "reference"]


def inputs(documents, *, heads=4, groups=2, key_dim=5, value_dim=7, dtype=torch.float64, keys=None):
    generator = torch.Generator().manual_seed(0)

    def draw(of, *shape):
        x = torch.randn(of.batch, of.length, *shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    keys = documents if keys is None else keys
    return draw(documents, heads, key_dim), draw(keys, groups, key_dim), draw(keys, groups, value_dim)


def whole_tile(documents, block_size=8, mask=None, query_block=1):
    return BlockTile(BlockLayout(documents, block_size), documents, documents, mask or Mask(), query_block)


def gradients(out, lse, tensors):
    """Of a random functional of out and of the finite lse."""
    generator = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    loss = loss + (torch.where(lse.isfinite(), lse.double(), 0.0) * weight).sum()
    return torch.autograd.grad(loss, tensors)


def assert_all_close(got, want, tolerance=1e-9):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def run(tensors, lists, tile, backend, **given):
    return block_sparse_attention(
        *tensors, lists, block_size=tile.layout.block_size, query_block=tile.query_block, mask=tile.mask,
        documents=tile.queries, return_lse=True, backend=backend, **given,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_op_and_gradients(mask, packing, backend):
    tile = whole_tile(PACKINGS[packing], mask=MASKS[mask])
    tensors = inputs(tile.queries)
    lists = random_lists(tile, 2, 3)
    got = run(tensors, lists, tile, backend)
    want = dense_attention(*tensors, lists, tile, 5**-0.5)
    assert_all_close(got, want)
    assert_all_close(gradients(*got, tensors), gradients(*want, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "groups", "list_heads"), [(6, 1, 1), (6, 1, 6), (6, 3, 6), (3, 3, 3)])
@pytest.mark.parametrize("query_block", [1, 4])
def test_lists_of_groups_heads_and_blocks_of_queries(heads, groups, list_heads, query_block, backend):
    tile = whole_tile(PACKINGS["packed"], query_block=query_block)
    tensors = inputs(tile.queries, heads=heads, groups=groups, key_dim=7, value_dim=3)
    lists = random_lists(tile, list_heads, 4)
    got = run(tensors, lists, tile, backend, scale=0.3)
    want = dense_attention(*tensors, lists, tile, 0.3)
    assert_all_close(got, want)
    assert_all_close(gradients(*got, tensors), gradients(*want, tensors))


@pytest.mark.parametrize(("block_size", "list_heads", "numbers"), [(1, 2, 500), (3, 6, 1 << 20)])
def test_blocks_of_a_token_or_little_more(monkeypatch, block_size, list_heads, numbers):
    monkeypatch.setattr(chunked, "NUMBERS", numbers)
    tile = whole_tile(PACKINGS["packed"], block_size=block_size)
    tensors = inputs(tile.queries, heads=6, groups=2)
    lists = random_lists(tile, list_heads, 7)
    got, want = run(tensors, lists, tile, "chunked"), dense_attention(*tensors, lists, tile, 5**-0.5)
    assert_all_close(got, want)
    assert_all_close(gradients(*got, tensors), gradients(*want, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_gradcheck(backend):
    tile = whole_tile(Documents.from_lengths([[3, 4], [6]], 7), block_size=2)
    lists = random_lists(tile, 1, 3, empty=False)
    tensors = inputs(tile.queries, heads=2, groups=1, key_dim=3, value_dim=2)

    def finite(*given):
        out, lse = run(given, lists, tile, backend)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(finite, tensors)


@pytest.mark.parametrize("mask", [Mask(), Mask(window=40, sink_tokens=2)])
def test_with_every_block_listed_it_is_softmax_attention(mask):
    documents = Documents.from_lengths([[100, 1, 63], [164]], 164)
    tile = whole_tile(documents, block_size=16, mask=mask)
    lists = torch.arange(tile.layout.count, dtype=torch.int32).repeat(2, 164, 2, 1)
    lists = torch.where(lists < torch.tensor(tile.layout.counts).view(2, 1, 1, 1), lists, -1)
    tensors = inputs(documents)
    got = run(tensors, lists, tile, "auto")
    want = softmax_attention(*tensors, mask=mask, documents=documents, return_lse=True)
    assert_all_close(got, want)
    assert_all_close(gradients(*got, tensors), gradients(*want, tensors))


@pytest.mark.parametrize(("scores", "keys"), [(64, 4), (1, 512), (300, 3)])
def test_tiles_of_queries_and_of_long_blocks(monkeypatch, scores, keys):
    monkeypatch.setattr(chunked, "SCORES", scores)
    monkeypatch.setattr(chunked, "KEYS", keys)
    for mask in MASKS.values():
        tile = whole_tile(PACKINGS["packed"], block_size=12, mask=mask)
        tensors, lists = inputs(tile.queries), random_lists(tile, 4, 2)
        got, want = (run(tensors, lists, tile, backend) for backend in BACKENDS)
        assert_all_close(got, want)
        assert_all_close(gradients(*got, tensors), gradients(*want, tensors))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_types_by_relative_norm(dtype, tolerance, backend):
    tile = whole_tile(Documents.from_lengths([[200, 1, 99]]), block_size=16)
    tensors, lists = inputs(tile.queries, key_dim=16, value_dim=16, dtype=dtype), random_lists(tile, 2, 6)
    got = run(tensors, lists, tile, backend)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = run(exact, lists, tile, "reference")
    for a, b in zip([got[0], *gradients(*got, tensors)], [want[0], *gradients(*want, exact)], strict=True):
        assert a.dtype == dtype
        assert float(((a.double() - b).norm() / b.norm()).detach()) < tolerance


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("spans", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_keys_held_by_ranks_merge_to_the_whole(ranks, spans, backend):
    documents = Documents.from_lengths([[5, 40, 3], [30, 9]], 48)
    layout = Layout(48, ranks, spans)
    blocks = BlockLayout(documents, 10)  # blocks straddle ranks, and spans of one rank
    q, k, v = (x.detach() for x in inputs(documents))
    lists = random_lists(BlockTile(blocks, documents, documents), 2, 3)
    dout, dlse = torch.randn(1, dtype=q.dtype) * v.repeat_interleave(2, 2), torch.randn(2, 48, 4, dtype=q.dtype)
    tile = BlockTile(blocks, documents, documents)
    whole = attend(q, k, v, lists, tile=tile, scale=0.4, backend="reference")
    want = attend_backward(Gradient(dout, *whole, dlse), q, k, v, lists, tile=tile, scale=0.4, backend="reference")
    sums = [torch.zeros_like(x) for x in want]
    for rank in range(ranks):
        queries, held = layout.documents(documents, rank), [layout.documents(documents, r) for r in range(ranks)]
        q_here, lists_here, dout_here, dlse_here = (layout.shard(x, rank) for x in (q, lists, dout, dlse))
        tiles = [BlockTile.of(blocks, queries, keys) for keys in held]
        keys, values = ([layout.shard(x, r) for r in range(ranks)] for x in (k, v))
        result = None
        for of_rank, k_here, v_here in zip(tiles, keys, values, strict=True):
            if of_rank is None:
                continue
            part = attend(q_here, k_here, v_here, lists_here, tile=of_rank, scale=0.4, backend=backend)
            result = part if result is None else merge(*result, *part)
        assert_all_close(result, [layout.shard(x, rank) for x in whole])
        for r, of_rank in enumerate(tiles):
            if of_rank is None:
                continue
            parts = attend_backward(
                Gradient(dout_here, *result, dlse_here), q_here, keys[r], values[r], lists_here, tile=of_rank,
                scale=0.4, backend=backend,
            )  # fmt: skip
            for total, part, of in zip(sums, parts, (rank, r, r), strict=True):
                empty = [torch.zeros_like(layout.shard(total, x)) for x in range(ranks)]
                empty[of] = part
                total += layout.unshard(empty)
    assert_all_close(sums, want)


def test_a_decoding_query_reads_the_blocks_of_all_keys():
    keys = Documents.whole(2, 37)
    tile = BlockTile(BlockLayout(keys, 8), Documents.whole(2, 1, position=36), keys)
    tensors = inputs(tile.queries, keys=keys)
    lists = torch.tensor([0, 4, -1], dtype=torch.int32).expand(2, 1, 2, 3)
    got = run(tensors, lists, tile, "auto", key_documents=keys)
    assert_all_close(got, dense_attention(*tensors, lists, tile, 5**-0.5))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("list_heads", "query_block"), [(2, 1), (4, 4)])
def test_queries_that_gather_their_own_keys(monkeypatch, list_heads, query_block, mask, packing):
    monkeypatch.setattr(chunked, "FEW", 100)
    tile = whole_tile(PACKINGS[packing], mask=MASKS[mask], query_block=query_block)
    tensors, lists = inputs(tile.queries), random_lists(tile, list_heads, 3)
    got = run(tensors, lists, tile, "chunked", scale=0.3)
    assert_all_close(got, dense_attention(*tensors, lists, tile, 0.3))


def test_few_queries_gather_keys_that_several_spans_hold(monkeypatch):
    monkeypatch.setattr(chunked, "FEW", 100)
    documents, layout = Documents.from_lengths([[5, 40, 3], [30, 9]], 48), Layout(48, 2, 4)
    blocks = BlockLayout(documents, 10)
    lists = random_lists(BlockTile(blocks, documents, documents), 2, 3)
    q, k, v = (x.detach() for x in inputs(documents))
    for rank, of in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        tile = BlockTile(blocks, layout.documents(documents, rank), layout.documents(documents, of))
        here = layout.shard(q, rank), *(layout.shard(x, of) for x in (k, v)), layout.shard(lists, rank)
        got, want = (attend(*here, tile=tile, scale=0.4, backend=backend) for backend in BACKENDS)
        assert_all_close(got, want)


def test_queries_that_see_nothing():
    tile = whole_tile(PACKINGS["packed"])
    tensors = inputs(tile.queries)
    for backend in BACKENDS:
        out, lse = run(tensors, torch.full((2, 43, 2, 3), -1, dtype=torch.int32), tile, backend)
        assert not out.any()
        assert (lse == -math.inf).all()
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), tensors))


def test_scores_far_apart_neither_overflow_nor_vanish():
    tile = whole_tile(Documents.whole(1, 32))
    q, k, v = (x.detach() for x in inputs(tile.queries, dtype=torch.float32))
    k[:, :8] *= 1e4
    k[:, 8:16] *= 1e-4
    lists = torch.arange(4, dtype=torch.int32).expand(1, 32, 2, 4)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    got = run(tensors, lists, tile, "auto")
    want = run([x.double() for x in tensors], lists, tile, "reference")
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-4, rtol=1e-4)
    assert all(x.isfinite().all() for x in gradients(*got, tensors))


def test_layout_numbers_blocks_document_by_document():
    documents = Documents.from_lengths([[5, 8, 1], [9]], 16)
    layout = BlockLayout(documents, 4)
    assert layout.counts == (5, 3)
    assert [tuple(block) for block in layout.row(0)] == [
        (0, 0, 4, 0), (0, 4, 1, 4), (1, 5, 4, 0), (1, 9, 4, 4), (2, 13, 1, 0),
    ]  # fmt: skip
    ids = layout.ids(documents)
    assert ids[0].tolist() == [0] * 4 + [1] + [2] * 4 + [3] * 4 + [4] + [-1] * 2
    assert torch.equal(layout.ids(documents.slice(3, 11)), ids[:, 3:11])
    pieces = layout.pieces(documents.slice(3, 11))
    assert pieces[0, 0].tolist() == [[0, 1, 3, 0], [1, 1, 4, 0], [2, 4, 0, 1], [6, 2, 4, 1], [0, 0, 0, 0]]


def test_a_block_in_two_spans_has_two_pieces():
    documents = Documents.whole(1, 16)
    held = Documents.concatenate([documents.slice(0, 4), documents.slice(8, 12)])
    pieces = BlockLayout(documents, 12).pieces(held)
    assert pieces[:, 0].tolist() == [[[0, 4, 0, 0], [0, 0, 0, 0]], [[4, 4, 8, 0], [0, 0, 0, 0]]]


def test_the_blocks_touched_are_those_listed():
    documents = Documents.from_lengths([[100, 28], [128]])
    tile = whole_tile(documents)
    own = tile.layout.ids(documents)
    first = torch.where(own < 13, 0, 13)
    first[1] = 0
    lists = torch.stack([torch.where(own == first, -1, first), own], dim=-1).unsqueeze(2).int()
    assert count_visits(lists, tile, kv_heads=1) == int((lists >= 0).sum())
    assert count_visits(lists, tile, kv_heads=1) == most_visits(documents, block_size=8, count=2)
    next_one = torch.minimum(own + 1, torch.tensor([[16], [15]])).view(2, 128, 1, 1).int()
    assert count_visits(next_one, tile, kv_heads=1) == 4 + 8  # only the last block of a row can be seen, by itself


def test_memory_and_work_follow_the_lists():
    length, block_size = 4096, 64
    documents = Documents.whole(1, length)
    tensors = inputs(documents, heads=4, groups=1, key_dim=16, value_dim=16, dtype=torch.float32)
    own = torch.arange(length) // block_size
    lists = torch.stack([own, (own - 1).clamp(min=-1)], -1).view(1, length, 1, 2).int()
    with LargestTensor() as largest:
        block_sparse_attention(*tensors, lists, block_size=block_size).sum().backward()
    assert largest.numel <= length * 4 * 16


def test_same_bits_at_every_run():
    tile = whole_tile(Documents.from_lengths([[150, 50]]), block_size=16)
    tensors, lists = inputs(tile.queries, dtype=torch.float32), random_lists(tile, 2, 5)
    first, second = ([*(got := run(tensors, lists, tile, "auto")), *gradients(*got, tensors)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_costs():
    documents = Documents.from_lengths([[10, 3], [13]])
    by_token = [min(2, t // 4 + 1) for n in (10, 3, 13) for t in range(n)]
    assert most_visits(documents, block_size=4, count=2) == sum(by_token)
    assert most_visits(documents.slice(2, 9), block_size=4, count=2) == sum(
        min(2, t // 4 + 1) for t in list(range(2, 9)) * 2
    )
    assert flops(10, block_size=64, heads_a_list=16, key_dim=192, value_dim=128) == 2 * 10 * 64 * 16 * 320
    assert state_bytes(100, kv_heads=2, key_dim=3, value_dim=5) == 100 * 2 * 8 * 2
    assert bytes_sent(100, kv_heads=2, key_dim=3, value_dim=5, ranks=4) == 3 * 100 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": torch.zeros(1, 20, 2, 1)}, "blocks must be int32"),
        ({"lists": torch.zeros(1, 19, 2, 1, dtype=torch.int32)}, "blocks must be int32"),
        ({"lists": torch.zeros(1, 20, 3, 1, dtype=torch.int32)}, "lists for 2 or 4 heads"),
        ({"lists": torch.full((1, 20, 2, 1), 3, dtype=torch.int32)}, "below the number of blocks"),
        ({"lists": torch.full((1, 20, 2, 1), -2, dtype=torch.int32)}, "ids, or −1"),
        ({"lists": torch.ones(1, 20, 2, 2, dtype=torch.int32)}, "at most once"),
        ({"block_size": 0}, "block_size"),
        ({"query_block": 0}, "query_block"),
        ({"documents": Documents.whole(1, 19)}, "documents must describe"),
        ({"documents": Documents.whole(1, 20, position=3)}, "must begin at position 0"),
        ({"backend": "triton", "dtype": torch.float64}, "float64"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    documents = Documents.whole(1, 20)
    q, k, v = inputs(documents, dtype=change.pop("dtype", torch.float32))
    lists = change.pop("lists", torch.zeros(1, 20, 2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, lists, **({"block_size": 8} | change))
