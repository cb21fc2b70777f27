"""Rows of unequal length that are decoded together, read in pieces or by several ranks, give what each gives alone."""

from collections import Counter

import pytest
import torch
from distributed import run_ranks, run_threads
from model_presets import few_or_many, small_hybrid, tokens

from longreach.kernels.documents import Documents
from longreach.kernels.latent import state_bytes as latent_bytes
from longreach.kernels.masks import Mask
from longreach.kernels.select_blocks import Rule
from longreach.kernels.select_blocks import state_bytes as summary_bytes
from longreach.kernels.softmax import state_bytes
from longreach.models.decoding import continue_all, generate, log_likelihoods, next_logits, prefill
from longreach.parallel import ops
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.threads import this_rank

LENGTHS = [23, 5, 37, 1, 23]  # of prompts
STEPS = 20  # tokens that follow: blocks and windows are completed at times that differ by row
ENDS = {1: 4, 2: 9}  # rows that end, and after how many of them


@torch.no_grad()
def alone(model, row):
    return model(row.unsqueeze(0), Sequence.single(Documents.whole(1, len(row))))[0]


def rows_of(lengths=LENGTHS):
    return [tokens(1, length + STEPS)[0] for length in lengths]


def together(model, rows, lengths=LENGTHS, ends=ENDS, **settings):
    """Logits `[B, Vocab]` after the prompts and after each token that follows; rows end after so many of these."""
    prompts = [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
    logits, cache = prefill(model, prompts, room=STEPS, **settings)
    results = [logits]
    for step in range(STEPS):
        for row, last in ends.items():
            if step == last:
                cache.end(row)
        following = torch.stack([row[length + step] for row, length in zip(rows, lengths, strict=True)])
        results.append(next_logits(model, following.unsqueeze(1), cache))
    return torch.stack(results, dim=1), cache


def compare(model, found, rows, lengths=LENGTHS, ends=ENDS):
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        count = ends.get(number, STEPS) + 1
        expected = alone(model, row)[length - 1 : length - 1 + count]
        torch.testing.assert_close(
            found[number, :count], expected, atol=1e-9, rtol=1e-9, msg=lambda text: f"row {number}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
@pytest.mark.parametrize("prefill_tokens", [7, None])
def test_rows_of_unequal_length_give_what_each_gives_alone(name, prefill_tokens):
    model, rows = small_hybrid(name), rows_of()
    compare(model, together(model, rows, prefill_tokens=prefill_tokens)[0], rows)


def by_ranks(rank, world, name, spans):
    rows = rows_of()
    return together(small_hybrid(name), rows, mesh=Mesh.create(world), spans=spans)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
@pytest.mark.parametrize(("world", "spans"), [(2, 2), pytest.param(3, 1, marks=pytest.mark.many)])
def test_ranks_that_share_prompts_give_what_one_gives(name, world, spans):
    parts = run_threads(world, by_ranks, name, spans)
    for part in parts:
        compare(small_hybrid(name), part, rows_of())
        assert torch.equal(part, parts[0])


def caches_of(cache):
    yield cache
    for part in cache._parts.values():
        yield from caches_of(part)


@pytest.mark.slow
def test_processes_that_share_prompts_give_what_one_gives():
    for part in run_ranks(2, by_ranks, "native_sparse_attention", 2):
        compare(small_hybrid("native_sparse_attention"), part, rows_of())


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
def test_memory_for_keys_is_made_once(name):
    model, rows, seen = small_hybrid(name), rows_of(), []
    logits, cache = prefill(model, [row[:9].tolist() for row in rows], room=STEPS, prefill_tokens=4)
    for _ in range(STEPS):
        held = [each for part in caches_of(cache) for each in part.rows.values()]
        seen.append([(x.data_ptr(), x.shape) for each in held for x in each.tensors])
        logits = next_logits(model, logits.argmax(-1, keepdim=True), cache)
    assert seen == seen[:1] * STEPS


MASKS = {"all": Mask(), "window": Mask(window=7), "window and sinks": Mask(window=7, sink_tokens=2)}


@pytest.mark.parametrize("mask", MASKS)
def test_memory_is_what_ops_state(mask):
    """Of a window besides one row, for the token that is decoded."""
    cache, mask, rows = DecodingCache(most=40), MASKS[mask], 3
    for length in (20, *[1] * 20):
        q, k, v = (torch.randn(rows, length, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
        ops.softmax_attention(q, k, v, mask=mask, seq=Sequence.decoding(cache, rows, length))
        cache.advance(length)
    stated = rows * state_bytes(40, kv_heads=2, key_dim=4, value_dim=4, mask=mask, element_bytes=8)
    assert cache.bytes == stated + (0 if mask == Mask() else rows * 2 * 8 * 8)


def test_memory_of_latents_and_summaries_is_what_ops_state():
    latents, summaries, rule = DecodingCache(most=40), DecodingCache(most=40), Rule(8, 2)
    for length in (20, *[1] * 20):
        q, latent = (torch.randn(3, length, *shape, dtype=torch.float64) for shape in ((4, 6), (7,)))
        ops.latent_attention(
            q, latent, torch.randn(4 * 8, 5, dtype=torch.float64), seq=Sequence.decoding(latents, 3, length)
        )
        ops.window_means(latent, seq=Sequence.decoding(summaries, 3, length), size=rule.span, stride=rule.step)
        latents.advance(length)
        summaries.advance(length)
    assert latents.bytes == 3 * latent_bytes(40, latent_dim=5, shared_dim=2, element_bytes=8)
    assert summaries.rows[0, "means"].bytes == 3 * summary_bytes(40, rule=rule, kv_heads=1, key_dim=7, element_bytes=8)
    assert summaries.rows[0, "means rows"].bytes == 3 * rule.span * 7 * 8  # a window with its last token


PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8]]


def texts(model, prompts=PROMPTS, **settings):
    steps = list(continue_all(model, prompts, max_new_tokens=14, **settings))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=str)
def test_prompts_are_continued_as_each_is_alone(settings):
    """With stops that end rows at different times: those after which most rows go on differ by row."""
    model = small_hybrid("sliding_window_attention")
    free = texts(model, **settings)
    stop = {free[0][9], free[2][4]}
    seed = settings.pop("seed", 0)
    found = texts(model, stop=stop, seed=seed, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = {"max_new_tokens": 14, "stop": stop, "seed": seed + row, **settings}
        assert found[row] == list(generate(model, prompt, **alone))
    assert len({len(row) for row in found}) > 1


def test_rows_end_where_the_caller_says():
    model, free = (
        small_hybrid("sliding_window_attention"),
        texts(small_hybrid("sliding_window_attention"), temperature=0),
    )
    counts = [0, 0, 0]

    def ends(row, token):
        counts[row] += 1
        return counts[row] == 5 + row

    assert texts(model, temperature=0, ends=ends) == [row[: 5 + number] for number, row in enumerate(free)]
    assert counts == [5, 6, 7]


def continued_by_ranks(rank, world, name):
    return texts(small_hybrid(name), temperature=0, mesh=Mesh.create(world))


def test_ranks_that_share_prompts_continue_them_as_one_does():
    parts = run_threads(2, continued_by_ranks, "gated_deltanet")
    assert parts == [texts(small_hybrid("gated_deltanet"), temperature=0)] * 2


def test_ranks_with_other_prompts_call_the_model_equally_often():
    """As they must where they share out its parameters: rows of the second data rank end later."""
    model, calls = small_hybrid("gated_deltanet"), []
    free = texts(model, temperature=0)

    def continued(rank, world):
        mesh, seen = Mesh.create(2), []

        def ends(row, token):
            seen.append(token)
            return len(seen) == 3 + 6 * mesh.data_rank

        return texts(model, [PROMPTS[mesh.data_rank]], temperature=0, mesh=mesh, together=True, ends=ends)

    with model.head.register_forward_hook(lambda *_: calls.append(this_rank().rank)):
        found = run_threads(4, continued)
    assert found == [[free[0][:3]]] * 2 + [[free[1][:9]]] * 2
    assert Counter(calls) == dict.fromkeys(range(4), 9)
    with pytest.raises(ValueError, match="mesh must be given with together"):
        texts(model, together=True)
    with pytest.raises(ValueError, match="prefill_tokens must be left out with together"):
        texts(model, together=True, mesh=Mesh(), prefill_tokens=2)


@pytest.mark.parametrize("prefill_tokens", [None, 5])
def test_log_likelihoods_are_those_of_a_forward(prefill_tokens):
    model, rows, given = small_hybrid("gated_deltanet"), rows_of([3, 9, 1]), [4, 1, 20]
    likely = list(generate(model, rows[0][:4].tolist(), max_new_tokens=10, temperature=0))
    rows[0] = torch.tensor([*rows[0][:4].tolist(), *likely])
    found = log_likelihoods(model, [row.tolist() for row in rows], given, prefill_tokens=prefill_tokens)
    for (value, greedy), row, first in zip(found, rows, given, strict=True):
        scores = alone(model, row).log_softmax(-1)[first - 1 : -1]
        assert value == pytest.approx(float(scores.gather(-1, row[first:, None]).sum()), abs=1e-9)
        assert greedy == bool((scores.argmax(-1) == row[first:]).all())
    assert [greedy for _, greedy in found] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts must be at least one"),
        ({"prompts": [[1], []]}, "prompt must have at least one token"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1; got 0"),
        ({"prefill_tokens": 4, "mesh": Mesh(sequence_ranks=2)}, "must be left out where 2 ranks share the prompts"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        continue_all(small_hybrid("softmax_attention"), **{"prompts": [[1]], "max_new_tokens": 4, **settings})
