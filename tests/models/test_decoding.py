"""Decoding through the cache equals the full forward; generation draws what it promises."""

import pytest
import torch
from model_presets import build_model, few_or_many, few_or_slow, in_pieces, randomise, small_hybrid, tokens

from longreach.kernels.documents import Documents
from longreach.models.decoding import _draw, generate, next_logits
from longreach.parallel.sequence import DecodingCache, Sequence

LENGTH = 40


def full(model, inputs):
    return model(inputs, Sequence.single(Documents.whole(*inputs.shape)))


@torch.no_grad()
def compare_hybrid(name, lengths):
    model, inputs = small_hybrid(name), tokens(2, LENGTH)
    torch.testing.assert_close(in_pieces(model, inputs, lengths), full(model, inputs), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", few_or_slow())
def test_a_decoded_token_costs_no_autograd_function(name, monkeypatch):
    model, inputs, cache = small_hybrid(name), tokens(2, 6), DecodingCache()
    entered = []
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(lambda cls, *_: entered.append(cls.__name__)))
    for piece in inputs.split([4, 1, 1], dim=1):
        next_logits(model, piece, cache)
    assert not entered


@pytest.mark.parametrize("name", few_or_slow())
def test_decoding_a_hybrid_gives_the_logits_of_the_full_forward(name):
    compare_hybrid(name, [9, 1, 1, 20, 1, 1, 7])


@pytest.mark.slow
@pytest.mark.parametrize("name", few_or_many())
def test_a_hybrid_decodes_token_by_token(name):
    compare_hybrid(name, [1] * LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["minimax_01_tiny", "sliding_window_tiny", "quickstart"])
@torch.no_grad()
def test_presets_decode_to_the_logits_of_the_full_forward(preset):
    length = 150  # past the window of sliding_window_tiny
    model = build_model(preset).double()
    model.initialise(0)
    randomise(model)
    inputs, cache = tokens(1, length), DecodingCache()
    expected = full(model, inputs)
    for start, stop in [(0, 120), *((t, t + 1) for t in range(120, length))]:
        actual = next_logits(model, inputs[:, start:stop], cache)
        torch.testing.assert_close(actual, expected[:, stop - 1], atol=1e-9, rtol=1e-9)
    assert cache.length == length


@torch.no_grad()
def test_a_windows_cache_stays_small():
    model, cache = small_hybrid("sliding_window_attention"), DecodingCache()
    sizes = []
    for _ in range(3):
        next_logits(model, tokens(1, LENGTH), cache)
        sizes.append(cache.of("mixer").rows[0, "attention"].kept)
    assert sizes == [2 + 15] * 3  # the sink tokens and the window but for the next query


def test_temperature_zero_takes_the_likeliest_token():
    model, ids = small_hybrid("lightning_attention"), [3, 1, 4]
    got = list(generate(model, ids, max_new_tokens=12, temperature=0.0))
    assert len(got) == 12
    for token in got:
        assert token == full(model, torch.tensor([ids]))[0, -1].argmax()
        ids = [*ids, token]


def test_draws_depend_on_the_seed_alone():
    model = small_hybrid("lightning_attention")

    def draw(seed, **settings):
        return list(generate(model, [3, 1], max_new_tokens=10, temperature=2.0, seed=seed, **settings))

    first = draw(5)
    torch.manual_seed(99)
    assert draw(5) == first
    assert draw(6) != first
    assert len(first) == 10
    assert all(0 <= token < 61 for token in first)
    assert draw(5, top_p=1e-9) == list(generate(model, [3, 1], max_new_tokens=10, temperature=0.0))


def test_stop_ends_before_its_token():
    model = small_hybrid("lightning_attention")
    free = list(generate(model, [3, 1], max_new_tokens=15, temperature=0.0))
    stop = free[-1]
    expected = free[: free.index(stop)]
    assert list(generate(model, [3, 1], max_new_tokens=15, temperature=0.0, stop=(stop, 1000))) == expected
    assert list(generate(model, [3, 1], max_new_tokens=0)) == []


def test_only_ids_that_a_tokenizer_knows_are_drawn():
    model, known = small_hybrid("lightning_attention"), {3, 7, 11, 1000}
    drawn = list(generate(model, [3, 1], max_new_tokens=40, temperature=50.0, known=known))
    assert set(drawn) == {3, 7, 11}
    assert set(generate(model, [3, 1], max_new_tokens=40, temperature=50.0, top_p=0.9, known=known)) <= {3, 7, 11}
    greedy = next(generate(model, [3, 1], max_new_tokens=1, temperature=0.0, known=known))
    logits = full(model, torch.tensor([[3, 1]]))[0, -1].detach()
    assert greedy == max((3, 7, 11), key=lambda token: float(logits[token]))
    assert list(generate(model, [3, 1], max_new_tokens=9, known=range(99))) == list(
        generate(model, [3, 1], max_new_tokens=9)
    )


def counts(logits, temperature, top_p, draws=1500):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([_draw(logits, temperature, top_p, generator) for _ in range(draws)])
    return drawn.bincount(minlength=len(logits)) / draws


def test_draws_follow_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    torch.testing.assert_close(counts(logits, 0.7, 1.0), (logits / 0.7).softmax(0), atol=0.05, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    torch.testing.assert_close(counts(logits, 1.0, 0.65), torch.tensor([0, 4 / 7, 3 / 7, 0]), atol=0.05, rtol=0)
    torch.testing.assert_close(counts(logits, 1.0, 0.75), torch.tensor([0, 4 / 9, 3 / 9, 2 / 9]), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_ids": []}, "prompt must have at least one token"),
        ({"prompt_ids": [61]}, r"prompt must hold ids in 0..60; got 61..61"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative; got -1"),
        ({"temperature": -0.1}, "temperature must not be negative"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"known": [61]}, r"known must hold ids in 0..60; got none"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p must be 1 at temperature 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(small_hybrid("lightning_attention"), **{"prompt_ids": [1], "max_new_tokens": 4, **settings})
