"""Summaries of blocks and windows, and selection by them, over ranks against one: what travels; decoding.

Two ranks with two spans are processes over gloo; others are threads.
"""

import functools

import pytest
import torch
from block_cases import GROUPS, KEY, LENGTH, PACKINGS, agrees, differentiated, drawn, run_where, sequence
from parallel_cases import RULES, learned

from longreach.kernels.documents import Documents
from longreach.kernels.select_blocks import WindowLayout
from longreach.parallel import ops
from longreach.parallel.collectives import counting, sum_over_ranks
from longreach.parallel.sequence import DecodingCache, Sequence

WINDOWS = {"blocks": (8, 8), "overlapping": (8, 4), "dense": (6, 2), "single": (1, 1), "longer than spans": (40, 8)}
RANKS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
SPANS = [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


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
                sum_over_ranks(got[1][1], seq)
            agrees(got[1][1], expected[1][1], f"{case}, {packing}, gradient of weights")


def lists(q, k, seq, rule):
    means = ops.window_means(k, seq=seq, size=rule.span, stride=rule.step)
    return ops.select_blocks(q, means, seq=seq, rule=rule)


@functools.cache
def lists_on_one_device(rule, packing):
    q, k, _ = drawn()
    return lists(q, k, Sequence.single(PACKINGS[packing]), RULES[rule])


def compare_selection(rank, world, spans, rules, packings):
    q, k, _ = drawn()
    for name in rules:
        for packing in packings:
            seq = sequence(PACKINGS[packing], rank, world, spans)
            found = lists(seq.shard(q), seq.shard(k), seq, RULES[name])
            assert torch.equal(found, seq.shard(lists_on_one_device(name, packing))), (name, packing)


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_summarise_as_one(world, spans):
    quick = (world, spans) == (2, 2)
    few = 2 if quick else None
    run_where(world, spans, compare_windows, spans, list(WINDOWS)[:few], list(PACKINGS)[:few])


@pytest.mark.slow
def test_one_rank_summarises_as_defined():
    compare_windows(0, 1, 1, list(WINDOWS), list(PACKINGS))


@pytest.mark.parametrize("world", RANKS)
@pytest.mark.parametrize("spans", SPANS)
def test_ranks_select_as_one(world, spans):
    run_where(world, spans, compare_selection, spans, list(RULES), list(PACKINGS))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_summaries_send_what_the_formula_says(world):
    run_where(world, 2, counted_summaries)


def counted_summaries(rank, world):
    """Whole strides of one document in each span: T / stride parts or windows a rank, and a halo a span."""
    seq, (size, stride), tokens = sequence(Documents.whole(2, LENGTH), rank, world, 2), (4, 2), LENGTH // world
    x, w, a_row = seq.shard(drawn()[1]).requires_grad_(), torch.ones(size, dtype=torch.float64), GROUPS * KEY * 8
    with counting() as forward:
        out = ops.window_means(x, seq=seq, size=size, stride=stride)
    with counting() as backward:
        out.sum().backward()
    gathered = (world - 1) * 2 * tokens // stride * a_row
    assert (dict(forward), dict(backward)) == ({"gather": gathered}, {"all to all": gathered})
    with counting() as forward:
        out = learned(x, w, seq=seq, size=size, stride=stride)
    with counting() as backward:
        out.sum().backward()
    rows = (world - 1) * 2 * 2 * (size - 1) * a_row
    assert (dict(forward), dict(backward)) == ({"gather": gathered + rows}, {"all to all": gathered, "sum": 2 * rows})


def decode(rule, steps, make):
    """The tokens of one document, a few at a time, as forward sees them at once."""
    q, k, v = drawn()
    w = torch.linspace(0.5, 1.5, rule.span, dtype=torch.float64)
    whole = make(q, k, v, w, Sequence.single(Documents.whole(2, LENGTH)))
    cache, outs, at = DecodingCache(), [], 0
    while at < LENGTH:
        n = min(steps[len(outs) % len(steps)], LENGTH - at)
        seq = Sequence.decoding(cache, 2, n)
        outs.append(make(*(x[:, at : at + n] for x in (q, k, v)), w, seq))
        cache.advance(n)
        at += n
    agrees(torch.cat(outs, dim=1), whole, "decoded")
    return cache


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [[LENGTH], [37, 1, 2, 1, 9]])
def test_decoding_gives_what_forward_gives(rule, steps):
    rule = RULES[rule]

    def make(q, k, v, w, seq):
        summaries = learned(k, w, seq=seq, size=rule.span, stride=rule.step)
        means = ops.window_means(k, seq=seq, size=rule.span, stride=rule.step)
        lists = ops.select_blocks(q, summaries + means, seq=seq, rule=rule)
        return ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=rule.block_size)

    cache = decode(rule, steps, make)
    count = WindowLayout(Documents.whole(2, LENGTH), rule.span, rule.step).count
    assert cache.rows[0, "means"].kept == count
    assert cache.rows[0, "windows"].kept == LENGTH - count * rule.step
