"""Block-sparse ops over gloo ranks against one: attention, selection, summaries, what travels; float64."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from longreach.kernels.block_sparse import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.mask import Mask
from longreach.kernels.select_blocks import Rule
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence

LENGTH, HEADS, GROUPS, KEY, VALUE = 96, 4, 2, 5, 7
PACKINGS = {
    "borders inside blocks": Documents.from_lengths([[7, 41, 1, 30, 5], [23, 50, 23]], LENGTH),
    "one long document": Documents.whole(2, LENGTH),
    "ranks of padding": Documents.from_lengths([[13, 2], []], LENGTH),
    "documents of one token": Documents.from_lengths([[1] * LENGTH, [1] * 20 + [60]], LENGTH),
}
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
WINDOWS = {"blocks": (8, 8), "overlapping": (8, 4), "dense": (6, 2), "single": (1, 1), "longer than spans": (40, 8)}
NSA = Rule(8, 4, window=4, stride=2, initial=1, local=2)
RULES = {
    "NSA": NSA,
    "MoBA": Rule(8, 3, score="dot", pooled=False),
    "InfLLM-v2": Rule(8, 4, window=4, stride=2, aggregate="max", initial=1, local=2),
    "long windows": Rule(8, 4, window=16, stride=8),
}


def agrees(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def sequence(documents, rank, world, spans, **settings):
    return Sequence(documents, Layout(LENGTH, world, spans), rank, dist.group.WORLD, **settings)


def differentiated(op, inputs, dout):
    """op's output and the gradient of each of its inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = op(*inputs)
    return out.detach(), list(torch.autograd.grad(out, inputs, dout(out), materialize_grads=True))


def drawn(seed=0):
    torch.manual_seed(seed)
    shapes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    return [torch.randn(2, LENGTH, *shape, dtype=torch.float64) for shape in shapes]


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


def compare_attention(rank, world, spans, cases, packings):
    for case in cases:
        block_size, query_block, _, mask = ATTENTION[case]
        settings = {"block_size": block_size, "query_block": query_block, "mask": mask}
        for packing in packings:
            documents = PACKINGS[packing]
            lists, inputs = whole_lists(documents, case), drawn()
            single = Sequence.single(documents)
            weights = torch.randn(2, LENGTH, HEADS, VALUE, dtype=torch.float64)
            out, gradients = differentiated(
                lambda *x: ops.block_sparse_attention(*x, lists, seq=single, **settings), inputs, lambda _: weights
            )
            seq = sequence(documents, rank, world, spans)
            here = held_lists(lists, query_block, seq)
            got, got_gradients = differentiated(
                lambda *x: ops.block_sparse_attention(*x, here, seq=seq, **settings),
                [seq.shard(x) for x in inputs],
                lambda _: seq.shard(weights),
            )
            agrees(got, seq.shard(out), f"{case}, {packing}, output")
            for name, x, expected in zip("qkv", got_gradients, gradients, strict=True):
                agrees(x, seq.shard(expected), f"{case}, {packing}, d{name}")


def learned(x, w, *, seq, size, stride):
    """What a mixer does with the tokens of windows: something that is not linear and differs by place."""
    rows = ops.local_windows(x, seq=seq, size=size, stride=stride)
    made = torch.tanh((rows * w.view(1, 1, size, 1, 1)).sum(2)) + 1.0
    return ops.gather_windows(made, seq=seq, size=size, stride=stride)


def naive_windows(documents, size, stride):
    """(row, first token) of every window, by row."""
    return [
        [run.start + i for run in runs if not run.is_padding for i in range(0, run.length - size + 1, stride)]
        for runs in documents.runs
    ]


def naive(x, make, documents, size, stride):
    rows = []
    for b, starts in enumerate(naive_windows(documents, size, stride)):
        made = [make(x[b, at : at + size]) for at in starts]
        rows.append(torch.stack([*made, *[0.0 * x[b, 0]] * (LENGTH // stride - len(made))]))
    return torch.stack(rows)


def compare_windows(rank, world, spans, cases, packings):
    for case in cases:
        size, stride = WINDOWS[case]
        for packing in packings:
            documents = PACKINGS[packing]
            x, w = drawn()[1], torch.linspace(0.5, 1.5, size, dtype=torch.float64)
            seq = sequence(documents, rank, world, spans) if world > 1 else Sequence.single(documents)
            # Every rank weighs the summaries differently: the gradient is the sum of what all ask for.
            weights = [torch.randn(2, LENGTH // stride, GROUPS, KEY, dtype=torch.float64) for _ in range(world)]
            expected = differentiated(
                lambda x: naive(x, lambda rows: rows.mean(0), documents, size, stride), [x], lambda _: sum(weights)
            )
            got = differentiated(
                lambda x: ops.window_means(x, seq=seq, size=size, stride=stride),
                [seq.shard(x)],
                lambda _: weights[rank],
            )
            agrees(got[0], expected[0], f"{case}, {packing}, means")
            agrees(got[1][0], seq.shard(expected[1][0]), f"{case}, {packing}, gradient of means")
            expected = differentiated(
                lambda x, w: naive(
                    x, lambda rows: torch.tanh((rows * w.view(size, 1, 1)).sum(0)) + 1.0, documents, size, stride
                ),
                [x, w],
                lambda _: sum(weights),
            )
            got = differentiated(
                lambda x, w: learned(x, w, seq=seq, size=size, stride=stride),
                [seq.shard(x), w],
                lambda _: weights[rank],
            )
            agrees(got[0], expected[0], f"{case}, {packing}, summaries")
            agrees(got[1][0], seq.shard(expected[1][0]), f"{case}, {packing}, gradient of rows")
            if world > 1:
                dist.all_reduce(got[1][1])
            agrees(got[1][1], expected[1][1], f"{case}, {packing}, gradient of weights")


def compare_selection(rank, world, spans, rules, packings):
    for name in rules:
        rule = RULES[name]
        for packing in packings:
            documents = PACKINGS[packing]
            q, k, _ = drawn()

            def lists(q, k, seq, rule=rule):
                means = ops.window_means(k, seq=seq, size=rule.span, stride=rule.step)
                return ops.select_blocks(q, means, seq=seq, rule=rule)

            seq = sequence(documents, rank, world, spans)
            expected = lists(q, k, Sequence.single(documents))
            assert torch.equal(lists(seq.shard(q), seq.shard(k), seq), seq.shard(expected)), (name, packing)


RANKS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
SPANS = [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_attend_as_one(world, spans):
    quick = (world, spans) == (2, 2)
    run_ranks(world, compare_attention, spans, list(ATTENTION)[: 3 if quick else None], list(PACKINGS))


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_summarise_as_one(world, spans):
    quick = (world, spans) == (2, 2)
    run_ranks(
        world, compare_windows, spans, list(WINDOWS)[: 2 if quick else None], list(PACKINGS)[: 2 if quick else None]
    )


@pytest.mark.slow
def test_one_rank_summarises_as_defined():
    compare_windows(0, 1, 1, list(WINDOWS), list(PACKINGS))


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_select_as_one(world, spans):
    run_ranks(world, compare_selection, spans, list(RULES), list(PACKINGS))
