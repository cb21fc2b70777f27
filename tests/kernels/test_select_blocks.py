"""Selection of blocks against loops over queries: the three rules, ties, packed rows, a rank's queries, costs."""

from dataclasses import replace

import pytest
import torch
from largest_tensor import LargestTensor

from longreach.kernels.blocks import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.select_blocks import (
    Rule,
    WindowLayout,
    bytes_sent,
    chunked,
    flops,
    select_blocks,
    state_bytes,
)
from longreach.kernels.softmax import attend
from longreach.parallel.layout import Layout

NSA = Rule(8, 4, window=4, stride=2, initial=1, local=2)
MOBA = Rule(8, 3, score="dot", pooled=False)
RULES = {
    "NSA": NSA,
    "InfLLM-v2": replace(NSA, aggregate="max"),
    "MoBA": MOBA,
    "MoBA, own block only": replace(MOBA, count=1),
    "MoBA, more than there are": replace(MOBA, count=40),
    "windows longer than blocks": Rule(4, 5, window=8, stride=4, initial=2),
    "tokens of blocks": Rule(8, 4, window=1, stride=1, score="dot", aggregate="max", pooled=False),
    "tokens, weighted": Rule(1, 6, score="relu", local=0),
    "a head's own, by softmax": Rule(6, 4, window=6, stride=2, pooled=False),
}
PACKINGS = {
    "1 token": Documents.whole(1, 1),
    "whole": Documents.whole(2, 70),
    "packed": Documents.from_lengths([[3, 37, 1, 20], [50, 5]], 65),
    "all padding": Documents.from_lengths([[9], []]),
}
BACKENDS = ["chunked", "reference"]


def inputs(documents, rule, *, heads=4, groups=2, key_dim=5, dtype=torch.float64, whole_numbers=False):
    generator = torch.Generator().manual_seed(0)
    count = WindowLayout(documents, rule.span, rule.step).count
    drawn = (
        torch.randn(documents.batch, n, h, key_dim, generator=generator, dtype=torch.float64)
        for n, h in ((documents.length, heads), (count, groups))
    )
    return [(x.round() if whole_numbers else x).to(dtype) for x in drawn]


def weights(q, rule):
    """Of each query and head, where the rule has them."""
    return {"weights": q.sum(-1)} if rule.score == "relu" else {}


def by_overlap(q, summaries, rule, documents, scale):
    """Scores of a block: over its tokens, over the windows that hold the token, of the window's softmax / stride."""
    windows, layout = WindowLayout(documents, rule.span, rule.step), BlockLayout(documents, rule.block_size)
    batch, length, heads, _ = q.shape
    groups = summaries.shape[2]
    lists = torch.full((batch, length, groups, rule.count), -1, dtype=torch.int32)
    for b, runs in enumerate(documents.runs):
        for run in runs:
            if run.is_padding:
                continue
            first = windows.first[b][run.document]
            for t in range(run.length):
                seen = [i for i in range(run.length) if i * rule.step + rule.span - 1 <= t]
                own = t // rule.block_size
                for g in range(groups):
                    heads_here = slice(g * heads // groups, (g + 1) * heads // groups)
                    keys = summaries[b, first : first + len(seen), g]
                    p = (scale * q[b, run.start + t, heads_here] @ keys.T).softmax(-1).sum(0)
                    score = {}
                    for i, weight in zip(seen, p.tolist(), strict=True):
                        for token in range(i * rule.step, i * rule.step + rule.span):
                            block = token // rule.block_size
                            score[block] = score.get(block, 0.0) + weight / rule.step
                    forced = set(range(min(rule.initial, own + 1))) | set(range(max(0, own + 1 - rule.local), own + 1))
                    others = sorted(set(score) - forced, key=lambda block: (-score[block], block))
                    chosen = sorted([*forced, *others[: rule.count - len(forced)]])
                    base = layout.first[b][run.document]
                    lists[b, run.start + t, g, : len(chosen)] = torch.tensor(chosen) + base
    return lists


def naive_gate(q, means, rule, documents):
    """MoBA's gate for one whole document: top k of the complete blocks before, the own one always among them."""
    length, heads = q.shape[1:3]
    lists = torch.full((1, length, heads, rule.count), -1, dtype=torch.int32)
    for t in range(length):
        own = t // rule.block_size
        for h in range(heads):
            dots = (means[0, :own, h * means.shape[2] // heads] @ q[0, t, h]).tolist()
            best = sorted(range(own), key=lambda block: (-dots[block], block))[: rule.count - 1]
            chosen = sorted([*best, own])
            lists[0, t, h, : len(chosen)] = torch.tensor(chosen)
    return lists


@pytest.mark.parametrize("rule", ["NSA", "windows longer than blocks"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packing", ["1 token", "packed"])
def test_overlap_is_what_counting_tokens_gives(rule, packing, backend):
    rule, documents = RULES[rule], PACKINGS[packing]
    q, summaries = inputs(documents, rule)
    got = select_blocks(q, summaries, rule=rule, documents=documents, scale=0.7, backend=backend)
    assert torch.equal(got, by_overlap(q, summaries, rule, documents, 0.7))


@pytest.mark.parametrize("whole_numbers", [False, True])  # whole numbers are full of ties
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moba_is_its_naive_gate(count, whole_numbers, backend):
    rule, documents = replace(MOBA, count=count), Documents.whole(1, 77)
    q, means = inputs(documents, rule, key_dim=2, whole_numbers=whole_numbers)
    got = select_blocks(q, means, rule=rule, backend=backend)
    assert torch.equal(got, naive_gate(q, means, rule, documents))


def test_greatest_of_the_windows_that_touch_a_block():
    rule, documents = RULES["InfLLM-v2"], Documents.whole(1, 64)
    q, summaries = inputs(documents, rule, heads=2, groups=1)
    got = select_blocks(q, summaries, rule=rule)
    for t in range(64):
        seen = (t - 3) // 2 + 1 if t >= 3 else 0
        p = (5**-0.5 * q[0, t] @ summaries[0, :seen, 0].T).softmax(-1).sum(0)
        own = t // 8
        forced = {0, own, max(own - 1, 0)}
        scores = {j: float(p[max(0, 4 * j - 1) : 4 * j + 4].max()) for j in range(own) if j not in forced}
        best = sorted(scores, key=lambda j: -scores[j])[: 4 - len(forced)]
        assert [x for x in got[0, t, 0].tolist() if x >= 0] == sorted(forced | set(best))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rule", RULES)
def test_tiles_choose_as_the_definition_does(monkeypatch, rule, packing, dtype):
    monkeypatch.setattr(chunked, "SCORES", 64)
    monkeypatch.setattr(chunked, "BLOCKS", 3)
    monkeypatch.setattr(chunked, "LISTS", 0)
    rule, documents = RULES[rule], PACKINGS[packing]
    q, summaries = inputs(documents, rule, dtype=dtype, whole_numbers=rule.score == "dot")
    got, want = (
        select_blocks(q, summaries, rule=rule, documents=documents, **weights(q, rule), backend=b) for b in BACKENDS
    )
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_chooses_among_the_blocks_of_the_whole_row(rule):
    rule, documents = RULES[rule], Documents.from_lengths([[3, 37, 1, 20], [50, 5]], 72)
    layout = Layout(72, 3, 2)
    q, summaries = inputs(documents, rule)
    whole = select_blocks(q, summaries, rule=rule, documents=documents, **weights(q, rule))
    for rank in range(3):
        q_here = layout.shard(q, rank)
        here = select_blocks(
            q_here, summaries, rule=rule, documents=layout.documents(documents, rank), row_documents=documents,
            **weights(q_here, rule),
        )  # fmt: skip
        assert torch.equal(here, layout.shard(whole, rank))


def compressed(windows):
    """Documents of a row of summaries, each standing at the last token of its window."""
    rows = []
    for table in windows.table().tolist():
        runs = [(d, n, 1, position + windows.size - 1) for n, (d, position, _) in enumerate(table) if d >= 0]
        rows.append(tuple(type(windows.documents.runs[0][0])(*run) for run in runs))
    return Documents.of_runs(rows, windows.count)


def test_compression_attention_gives_the_normaliser():
    documents = Documents.from_lengths([[3, 37, 1, 20]])
    windows = WindowLayout(documents, NSA.span, NSA.step)
    q, summaries = inputs(documents, NSA)
    tile = Mask().tile(documents, compressed(windows))
    out, lse = attend(q, summaries, summaries[..., :3], tile=tile, scale=5**-0.5)
    for b, t, h in ((0, 2, 0), (0, 9, 1), (0, 39, 3), (0, 60, 2)):
        run = next(run for run in documents.runs[b] if run.start <= t < run.stop)
        first, seen = windows.first[b][run.document], windows.number(t - run.start + 1)
        keys = summaries[b, first : first + seen, h // 2]
        scores = 5**-0.5 * keys @ q[b, t, h]
        torch.testing.assert_close(lse[b, t, h], scores.logsumexp(0))
        torch.testing.assert_close(out[b, t, h], scores.softmax(0) @ keys[:, :3])
    for backend in BACKENDS:
        given, found = (
            select_blocks(q, summaries, rule=NSA, documents=documents, lse=x, backend=backend) for x in (lse, None)
        )
        assert torch.equal(given, found)


def test_weighted_scores_are_those_of_the_lightning_indexer():
    rule, documents = RULES["tokens, weighted"], Documents.whole(1, 40)
    q, k = inputs(documents, rule, heads=3, groups=1)
    w = weights(q, rule)["weights"]
    got = select_blocks(q, k, rule=rule, weights=w)
    for t in range(40):
        scores = sum(w[0, t, h] * (5**-0.5 * k[0, : t + 1, 0] @ q[0, t, h]).relu() for h in range(3)).tolist()
        best = sorted(range(t + 1), key=lambda s: (-scores[s], s))[:6]
        assert [x for x in got[0, t, 0].tolist() if x >= 0] == sorted(best)
    for given in ({}, {"weights": w[..., :1]}):
        with pytest.raises(ValueError, match=r"weights must be \[B, T, H\]"):
            select_blocks(q, k, rule=rule, **given)
    with pytest.raises(ValueError, match="triton"):
        select_blocks(q, k, rule=rule, weights=w, backend="triton")


def test_overlap_of_the_paper():
    assert Rule(64, 16, window=32, stride=16).weights == (1, 2, 2, 2, 1)
    assert Rule(512, 3).weights == (1,)


def test_nothing_of_the_size_of_all_scores_is_held():
    documents = Documents.whole(1, 2048)
    rule = Rule(16, 4, window=8, stride=4)
    q, summaries = inputs(documents, rule, heads=4, groups=1, dtype=torch.float32)
    with LargestTensor() as largest:
        select_blocks(q, summaries, rule=rule)
    assert largest.numel <= chunked.SCORES  # and 2048 · 512 · 4 would be four times as many


def test_costs():
    documents = Documents.from_lengths([[21, 3], [24]])
    seen = sum(max(0, (t - 3) // 2 + 1) for n in (21, 3, 24) for t in range(n))
    assert flops(documents, rule=NSA, heads=4, key_dim=8) == 2 * seen * 4 * 8 * 2
    assert flops(documents, rule=NSA, heads=4, key_dim=8, has_lse=True) == 2 * seen * 4 * 8
    assert state_bytes(21, rule=NSA, kv_heads=2, key_dim=8) == 9 * 2 * 8 * 2
    assert bytes_sent(20, rule=NSA, kv_heads=2, key_dim=8, ranks=4) == 3 * 10 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "initial": 1, "local": 2}, "room for the forced"),
        ({"count": 0}, "count must be"),
        ({"count": 4, "window": 4}, "come together"),
        ({"count": 4, "window": 6, "stride": 4}, "must divide"),
        ({"count": 4, "window": 6, "stride": 3}, "must divide"),
        ({"count": 4, "score": "cosine"}, "score must be"),
        ({"count": 4, "aggregate": "mean"}, "aggregate must be"),
    ],
)
def test_rules_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rule(8, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summaries": torch.zeros(1, 9, 2, 5)}, "10 per row; got 9"),
        ({"summaries": torch.zeros(1, 10, 3, 5)}, "divide the query heads"),
        ({"summaries": torch.zeros(1, 10, 2, 4)}, "summaries must be"),
        ({"summaries": torch.zeros(1, 10, 2, 5).double()}, "one dtype"),
        ({"documents": Documents.whole(1, 21)}, "documents must describe"),
        ({"documents": Documents.whole(1, 22, position=1)}, "must begin at position 0"),
        ({"lse": torch.zeros(1, 22, 3)}, "lse must be"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"summaries": torch.zeros(1, 10, 2, 5), "rule": NSA} | change
    with pytest.raises(ValueError, match=message):
        select_blocks(torch.zeros(1, 22, 4, 5), **given)
