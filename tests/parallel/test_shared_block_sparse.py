"""Block-sparse attention over ranks against one, whatever the lists; what travels; recomputation; compilation.

Two ranks with two spans are processes over gloo; others are threads.
"""

import functools

import pytest
import torch
from block_cases import (
    GROUPS,
    HEADS,
    KEY,
    LENGTH,
    PACKINGS,
    VALUE,
    agrees,
    differentiated,
    drawn,
    run_where,
    sequence,
)
from distributed import run_ranks
from parallel_cases import sparse_layer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from longreach.kernels import block_sparse as kernel
from longreach.kernels.block_sparse import BlockSparseAttend, BlockSparseInputs
from longreach.kernels.blocks import BlockLayout
from longreach.kernels.masks import Mask
from longreach.kernels.operation import Kept
from longreach.parallel import ops
from longreach.parallel.collectives import counting
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategies.listed_blocks import by_blocks, bytes_sent

# block size, query block, heads with lists, mask
ATTENTION = {
    "group lists": (8, 1, GROUPS, Mask()),
    "head lists": (8, 1, HEADS, Mask()),
    "query blocks": (8, 2, GROUPS, Mask()),
    "long blocks": (40, 1, GROUPS, Mask()),
    "short blocks": (3, 1, GROUPS, Mask()),
    "window": (8, 1, GROUPS, Mask(window=17, sink_tokens=2)),
    "two-sided": (8, 1, GROUPS, Mask(causal=False)),
}


def whole_lists(documents, case, slots=4):
    """Blocks of the row in random order, without repetition; a fifth of the places is empty."""
    block_size, query_block, heads, _ = ATTENTION[case]
    generator = torch.Generator().manual_seed(0)
    lists = torch.full((2, LENGTH // query_block, heads, slots), -1, dtype=torch.int32)
    for row, count in enumerate(BlockLayout(documents, block_size).counts):
        order = torch.rand(*lists.shape[1:3], count, generator=generator).argsort(-1)[..., :slots].int()
        lists[row, ..., : order.shape[-1]] = order
    return lists.masked_fill(torch.rand(lists.shape, generator=generator) < 0.2, -1)


def held_lists(lists, query_block, seq):
    """The lists of the queries held, whose blocks of queries are whole."""
    return seq.shard(lists.repeat_interleave(query_block, dim=1))[:, ::query_block].contiguous()


@functools.cache
def on_one_device(case, packing):
    """Lists, inputs, the output's gradient, and what the kernel makes of them."""
    documents, lists, inputs = PACKINGS[packing], whole_lists(PACKINGS[packing], case), drawn()
    weights = torch.randn(2, LENGTH, HEADS, VALUE, dtype=torch.float64)
    settings = settings_of(case)
    out, gradients = differentiated(
        lambda *x: kernel.block_sparse_attention(*x, lists, documents=documents, **settings),
        inputs,
        lambda _: weights,
    )
    return lists, inputs, weights, out, gradients


def settings_of(case):
    block_size, query_block, _, mask = ATTENTION[case]
    return {"block_size": block_size, "query_block": query_block, "mask": mask}


def compare_attention(rank, world, spans, cases, packings):
    for case in cases:
        settings = settings_of(case)
        for packing in packings:
            lists, inputs, weights, out, gradients = on_one_device(case, packing)
            seq = sequence(PACKINGS[packing], rank, world, spans)
            here = held_lists(lists, settings["query_block"], seq)
            got, got_gradients = differentiated(
                lambda *x, seq=seq, here=here: ops.block_sparse_attention(*x, here, seq=seq, **settings),
                [seq.shard(x) for x in inputs],
                lambda _, seq=seq, weights=weights: seq.shard(weights),
            )
            agrees(got, seq.shard(out), f"{case}, {packing}, output")
            for name, x, expected in zip("qkv", got_gradients, gradients, strict=True):
                agrees(x, seq.shard(expected), f"{case}, {packing}, d{name}")


RANKS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
SPANS = [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_attend_as_one(world, spans):
    quick = (world, spans) == (2, 2)
    run_where(world, spans, compare_attention, spans, list(ATTENTION)[: 3 if quick else None], list(PACKINGS))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_travels_is_what_lists_ask_for(world):
    run_where(world, 2, counted)


def counted(rank, world):
    """Bytes by a naive count of the tokens in listed blocks, against those sent and the formula."""
    for packing, quiet in (("borders inside blocks", 0), ("ranks of padding", 3), ("one long document", 1)):
        documents = PACKINGS[packing]
        seqs, layout = [sequence(documents, peer, world, 2) for peer in range(world)], BlockLayout(documents, 8)
        lists, seq, ids = whole_lists(documents, "group lists"), seqs[rank], layout.ids(documents)
        everyone = [held_lists(lists, 1, each) for each in seqs]
        if quiet < world:
            everyone[quiet] = torch.full_like(everyone[quiet], -1)  # a rank that asks for nothing
        wanted = [[set(row.flatten().tolist()) - {-1} for row in each] for each in everyone]

        def tokens(owner, asker, ids=ids, wanted=wanted, seqs=seqs):
            held = seqs[owner].shard(ids)
            return sum(int(held[b, t]) in wanted[asker][b] for b in range(2) for t in range(LENGTH // world))

        others = [peer for peer in range(world) if peer != rank]
        asked, asks = sum(tokens(rank, p) for p in others), sum(tokens(p, rank) for p in others)
        a_token, bits = GROUPS * (KEY + VALUE) * 8, (world - 1) * (2 * layout.count + 1)
        inputs = [seq.shard(x).requires_grad_() for x in drawn()]
        plan = by_blocks(BlockSparseAttend, 8, 1, Mask(), 1.0).ask(BlockSparseInputs(*inputs, everyone[rank]), seq)
        sends, receives, _ = plan.read(seq)
        formula = bytes_sent(
            sum(sends), sum(receives), blocks=2 * layout.count, ranks=world, kv_heads=GROUPS, key_dim=KEY,
            value_dim=VALUE, element_bytes=8,
        )  # fmt: skip
        assert formula == (bits + asked * a_token, (asked + asks) * a_token)
        with counting() as forward:
            out = ops.block_sparse_attention(*inputs, everyone[rank], seq=seq, block_size=8)
        with counting() as backward:
            out.sum().backward()
        assert (sum(forward.values()), sum(backward.values())) == formula
        if rank == quiet:
            assert not out.any()
            assert asks == 0


@pytest.mark.slow
def test_wrong_lists_of_one_rank_are_everyones_error():
    run_ranks(2, refused, timeout=60)


def refused(rank, world):
    documents = PACKINGS["one long document"]
    seq = sequence(documents, rank, world, 2)
    inputs = [seq.shard(x) for x in drawn()]
    lists = torch.zeros(2, LENGTH // world, GROUPS, 1, dtype=torch.int32)
    for wrong, text in ((lists + 12, "below the number of blocks"), (lists.long(), "must be int32"),
                        (lists[:, 1:], "must be int32"), (lists.repeat(1, 1, 1, 2), "at most once")):  # fmt: skip
        for at in range(world):
            with pytest.raises(ValueError, match=text):
                ops.block_sparse_attention(*inputs, wrong if rank == at else lists, seq=seq, block_size=8)
    for size, stride in ((0, 1), (6, 4), (4, 8)):
        with pytest.raises(ValueError, match="multiple of their stride"):
            ops.window_means(inputs[0], seq=seq, size=size, stride=stride)
    out = ops.block_sparse_attention(*inputs, lists, seq=seq, block_size=8)
    assert out.shape == (*inputs[2].shape[:2], HEADS, VALUE)


@pytest.mark.slow
def test_query_blocks_are_of_the_tokens_held():
    run_ranks(2, uneven, timeout=60)


def uneven(rank, world):
    """Blocks of 5 queries in spans of 24 tokens: they go over spans, and a list still holds for each of them."""
    documents = PACKINGS["borders inside blocks"]
    seq, (q, k, v) = sequence(documents, rank, world, 2), drawn()
    lists = [whole_lists(documents, "group lists")[:, peer : peer + 10] for peer in range(world)]
    by_token = [each.repeat_interleave(5, dim=1)[:, : LENGTH // world] for each in lists]
    whole = seq.layout.unshard(by_token)
    expected = ops.block_sparse_attention(q, k, v, whole, seq=Sequence.single(documents), block_size=8)
    got = ops.block_sparse_attention(
        *(seq.shard(x) for x in (q, k, v)), lists[rank], seq=seq, block_size=8, query_block=5
    )
    agrees(got, seq.shard(expected), "output")


@pytest.mark.slow
def test_recomputation_repeats_no_collective():
    run_ranks(2, recomputed, timeout=60)


def recomputed(rank, world):
    inputs, w = drawn(), torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    results, sent = [], []
    for keep in (False, True):
        seq = sequence(PACKINGS["borders inside blocks"], rank, world, 2, kept=Kept() if keep else None)
        local = [x.clone().requires_grad_() for x in [*(seq.shard(x) for x in inputs), w]]
        with counting() as bytes_here:
            if keep:
                out = checkpoint(lambda *x, seq=seq: sparse_layer(*x, seq=seq), *local, use_reentrant=False)
            else:
                out = sparse_layer(*local, seq=seq)
            out.square().sum().backward()
        results.append([x.grad for x in local])
        sent.append(bytes_here)
    assert sent[0] == sent[1]
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_one_graph_serves_every_batch(world):
    if world == 1:
        compiled(0, 1)
    else:
        run_ranks(world, compiled, timeout=300)


def compiled(rank, world):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(sparse_layer, fullgraph=True, backend=counter)
    inputs, w = drawn(), torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    for documents in PACKINGS.values():
        seq = sequence(documents, rank, world, 2) if world > 1 else Sequence.single(documents)
        local = [*(seq.shard(x) for x in inputs), w]
        weights = torch.randn(2, LENGTH // world, HEADS, VALUE, dtype=torch.float64)
        results = [differentiated(lambda *x, f=f, seq=seq: f(*x, seq=seq), local, lambda _, w=weights: w)
                   for f in (call, sparse_layer)]  # fmt: skip
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_half_precision_loses_nothing_on_the_way():
    run_ranks(2, halves, timeout=60)


def halves(rank, world):
    """bfloat16 on two ranks is as far from float64 as bfloat16 on one, and twice the same."""
    documents = PACKINGS["borders inside blocks"]
    seq, single, lists = sequence(documents, rank, world, 2), Sequence.single(documents), None
    rough = [x.bfloat16() for x in drawn()]
    lists = whole_lists(documents, "group lists")
    dout = torch.randn(2, LENGTH, HEADS, VALUE).bfloat16()

    def run(seq, dtype):
        here = [seq.shard(x).to(dtype) for x in rough]
        return differentiated(
            lambda *x: ops.block_sparse_attention(*x, seq.shard(lists), seq=seq, block_size=8),
            here,
            lambda _: seq.shard(dout).to(dtype),
        )

    exact, one, got, again = (run(single, torch.float64), run(single, torch.bfloat16), run(seq, torch.bfloat16),
                              run(seq, torch.bfloat16))  # fmt: skip
    for x, y, z, t in zip(*([r[0], *r[1]] for r in (exact, one, got, again)), strict=True):
        assert torch.equal(z, t)
        scale = x.abs().max()
        assert (seq.shard(x) - z).abs().max() <= 1.05 * (x - y).abs().max() + 1e-3 * scale


def test_one_rank_is_the_kernel():
    documents, lists = PACKINGS["borders inside blocks"], whole_lists(PACKINGS["borders inside blocks"], "head lists")
    inputs, weights = drawn(), torch.randn(2, LENGTH, HEADS, VALUE, dtype=torch.float64)
    seq = Sequence.single(documents)
    calls = (
        lambda *x: ops.block_sparse_attention(*x, lists, seq=seq, block_size=8),
        lambda *x: kernel.block_sparse_attention(*x, lists, documents=documents, block_size=8),
    )
    (ours, dours), (theirs, dtheirs) = (differentiated(call, inputs, lambda _: weights) for call in calls)
    for x, y in zip((ours, *dours), (theirs, *dtheirs), strict=True):
        assert torch.equal(x, y)
