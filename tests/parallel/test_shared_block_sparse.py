"""Block-sparse ops over gloo ranks against one: attention, selection, summaries, what travels; float64."""

import functools
import random

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from longreach.kernels import block_sparse as kernel
from longreach.kernels.block_sparse import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.mask import Mask
from longreach.kernels.select_blocks import Rule, WindowLayout
from longreach.parallel import ops
from longreach.parallel.block_sparse import BlockSparseAttention, bytes_sent
from longreach.parallel.collectives import counting
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import DecodingCache, Kept, Sequence

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


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_travels_is_what_lists_ask_for(world):
    run_ranks(world, counted, timeout=60)


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
        plan = BlockSparseAttention(8, 1, True, None, 0, 1.0).ask(inputs[0], inputs[1], everyone[rank], seq)
        formula = bytes_sent(
            plan, blocks=2 * layout.count, ranks=world, kv_heads=GROUPS, key_dim=KEY, value_dim=VALUE, element_bytes=8
        )
        assert formula == (bits + asked * a_token, bits + (asked + asks) * a_token)
        with counting() as forward:
            out = ops.block_sparse_attention(*inputs, everyone[rank], seq=seq, block_size=8)
        with counting() as backward:
            out.sum().backward()
        assert (sum(forward.values()), sum(backward.values())) == formula
        if rank == quiet:
            assert not out.any()
            assert asks == 0


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_summaries_send_what_the_formula_says(world):
    run_ranks(world, counted_summaries, timeout=60)


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


def sparse_layer(q, k, v, w, *, seq, rule=NSA):
    """Selection by learned summaries, then attention to what is selected: every op once, as a mixer would.

    Every token also reads the summaries, as if it attended to all of them: so they have a gradient from every rank.
    """
    summaries = learned(k, w, seq=seq, size=rule.span, stride=rule.step)
    summaries = summaries + ops.window_means(k, seq=seq, size=rule.span, stride=rule.step)
    lists = ops.select_blocks(q, summaries, seq=seq, rule=rule)
    out = ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=rule.block_size)
    places = torch.arange(1.0, summaries.shape[1] + 1, dtype=q.dtype).view(1, -1, 1, 1)
    return out + (summaries * places).sum((1, 2, 3), keepdim=True)


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
    assert cache.entries[0, "means"][0].shape[1] == count
    assert cache.entries[0, "windows"][0].shape[1] == LENGTH - count * rule.step


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


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_drawn_rows(world):
    run_ranks(world, drawn_rows, 40, timeout=300)


def drawn_rows(rank, world, cases):
    """Lengths, borders, layouts, rules and windows drawn at random: selection by learned summaries, then attention."""
    draw = random.Random(world)
    for case in range(cases):
        spans = draw.choice([1, 2, 3, 4])
        length = world * spans * draw.randint(1, 16)
        rows = []
        for _ in range(2):
            lengths, left = [], length
            while left and draw.random() < 0.9:
                lengths.append(draw.randint(1, draw.choice([1, min(left, 9), left]) if left > 1 else 1))
                left -= lengths[-1]
            rows.append(lengths)
        documents, stride = Documents.from_lengths(rows, length), draw.randint(1, 4)
        rule = Rule(stride * draw.randint(1, 4), draw.randint(3, 6), window=stride * draw.randint(1, 4), stride=stride,
                    score=draw.choice(["softmax", "dot"]), aggregate=draw.choice(["sum", "max"]),
                    pooled=draw.random() < 0.5, initial=draw.randint(0, 1), local=draw.randint(1, 2))  # fmt: skip
        torch.manual_seed(case)
        shapes = ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
        inputs = [torch.randn(2, length, *shape, dtype=torch.float64) for shape in shapes]
        w, weights = torch.rand(rule.span, dtype=torch.float64), torch.randn(2, length, HEADS, VALUE).double()
        single = Sequence.single(documents)
        seq = Sequence(documents, Layout(length, world, spans), rank, dist.group.WORLD)
        layer = functools.partial(sparse_layer, rule=rule)
        out, gradients = differentiated(lambda *x: layer(*x, seq=single), [*inputs, w], lambda _: weights)
        got, ours = differentiated(
            lambda *x: layer(*x, seq=seq), [*(seq.shard(x) for x in inputs), w], lambda _: seq.shard(weights)
        )
        dist.all_reduce(ours[-1])
        where = f"{rows}, length {length}, spans {spans}, {rule}"
        agrees(got, seq.shard(out), where)
        for x, expected in zip(ours[:-1], gradients[:-1], strict=True):
            agrees(x, seq.shard(expected), where)
        agrees(ours[-1], gradients[-1], where)


def test_finite_differences_in_lockstep():
    run_ranks(2, finite_differences, 9, timeout=60)


def finite_differences(rank, world, moves):
    """A random projection of all ranks' outputs, as one coordinate of one rank is moved; lists stay as they are."""
    documents = PACKINGS["borders inside blocks"]
    seq = sequence(documents, rank, world, 2)
    lists, w = held_lists(whole_lists(documents, "group lists"), 1, seq), torch.linspace(0.5, 1.5, 4).double()
    q, k, v = (seq.shard(x).requires_grad_() for x in drawn())
    weights = [
        torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) for n in [1 << 14] * 3
    ]

    def objective():
        outs = (
            ops.block_sparse_attention(q, k, v, lists, seq=seq, block_size=8),
            ops.window_means(k, seq=seq, size=8, stride=4),
            learned(k, w, seq=seq, size=4, stride=2),
        )
        return sum((x.flatten() * projection[: x.numel()]).sum() for x, projection in zip(outs, weights, strict=True))

    objective().backward()
    draw, step = random.Random(0), 1e-5
    for move in range(moves):
        at, name = draw.randrange(world), "qkv"[move % 3]
        x = {"q": q, "k": k, "v": v}[name]
        coordinate, values = draw.randrange(x.numel()), []
        for sign in (1, -1):
            with torch.no_grad():
                if rank == at:
                    x.view(-1)[coordinate] += sign * step
                value = objective()
                dist.all_reduce(value)
                values.append(value)
                if rank == at:
                    x.view(-1)[coordinate] -= sign * step
        if rank == at:
            torch.testing.assert_close(
                (values[0] - values[1]) / (2 * step), x.grad.view(-1)[coordinate], rtol=1e-6, atol=1e-7
            )
