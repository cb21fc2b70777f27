"""Rotary positions against transformers' rotation and its scalings of the frequencies."""

import math

import pytest
import torch
from definitions import definitions_of

from longreach.kernels.pointwise import RopeScaling, rope, rope_frequencies


def positions_of(batch, length, start=0):
    return torch.arange(start, start + length, dtype=torch.int32).expand(batch, length)


@pytest.mark.parametrize(("start", "length"), [(0, 63), (1000, 63), (0, 701)])  # the last is of two tiles
def test_rotation_equals_that_of_transformers(start, length):
    llama = definitions_of("llama")
    frequencies, factor = rope_frequencies(16, 10000.0)
    positions = positions_of(2, length, start)
    q, k = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16)
    angles = positions[..., None].double() * frequencies.double()
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1).float() for f in (torch.cos, torch.sin))
    wanted = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, want in zip((q, k), wanted, strict=True):
        got = rope(x, positions, inverse_frequencies=frequencies, attention_factor=factor)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


CASES = {
    "default": (None, {}),
    "linear": (RopeScaling("linear", 4.0), {"factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, original_length=8192, low_frequency_factor=1.0, high_frequency_factor=4.0),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama3, other factors": (
        RopeScaling("llama3", 32.0, original_length=4096, low_frequency_factor=2.0, high_frequency_factor=8.0),
        {
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "llama3, nothing to blend": (
        RopeScaling("llama3", 16.0, original_length=8192, low_frequency_factor=1.0, high_frequency_factor=1.0),
        {
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, original_length=32768),
        {"factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn, other settings": (
        RopeScaling("yarn", 16.0, original_length=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
        {
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
    ),
    "yarn, not truncated": (
        RopeScaling("yarn", 32.0, original_length=4096, truncate=False),
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_those_of_transformers(case, base, dim):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    scaling, settings = CASES[case]
    frequencies, factor = rope_frequencies(dim, base, scaling)
    assert frequencies.dtype == torch.float32
    kind = case.split(",")[0]
    config = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": base, **settings},
    )
    if kind == "default":
        rotary = definitions_of("llama").LlamaRotaryEmbedding(config)
        wanted, wanted_factor = rotary.inv_freq, rotary.attention_scaling
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert torch.equal(frequencies, wanted)
    assert factor == pytest.approx(wanted_factor, rel=1e-12)


@pytest.mark.parametrize("length", [None, 500, 1000, 1001, 7777])
@pytest.mark.parametrize("dim", [6, 64])
def test_scalings_by_length_equal_those_of_transformers_at_that_length(dim, length):
    """They look at each input's length, and take the model's own for none."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    short, long = ([start + i / 7 for i in range(dim // 2)] for start in (1.0, 3.0))
    settings = {"original_length": 1000, "length": length}
    cases = {
        "dynamic": (RopeScaling("dynamic", 2.5, **settings), {"factor": 2.5}),
        "longrope": (
            RopeScaling("longrope", 8.0, short_factors=short, long_factors=long, **settings),
            {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 1000, "factor": 8.0},
        ),
    }
    for kind, (scaling, theirs) in cases.items():
        config = transformers.LlamaConfig(
            hidden_size=4 * dim,
            num_attention_heads=4,
            max_position_embeddings=1000,
            rope_parameters={"rope_type": kind, "rope_theta": 5e5, **theirs},
        )
        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        frequencies, factor = rope_frequencies(dim, 5e5, scaling)
        assert torch.equal(frequencies, wanted)
        assert factor == pytest.approx(wanted_factor, rel=1e-12)
        longer = kind == "longrope" and (length or 0) > 1000
        assert scaling.longest == (None if longer else max(length or 0, 1000))
    assert RopeScaling("longrope", 8.0, short_factors=long, long_factors=long, **settings).longest is None


def test_an_ntk_base_stretches_the_lowest_frequency_as_linear_does_and_keeps_the_highest():
    ntk, linear, plain = (
        rope_frequencies(16, 1e4, None if kind is None else RopeScaling(kind, 4.0))[0]
        for kind in ("ntk", "linear", None)
    )
    assert ntk[0] == plain[0] == 1.0
    torch.testing.assert_close(ntk[-1], linear[-1])
    torch.testing.assert_close(ntk, rope_frequencies(16, 1e4 * 4.0 ** (16 / 14))[0])


def test_partial_rotation_passes_the_rest_and_attention_factor_scales_what_turns():
    frequencies, _ = rope_frequencies(8, 100.0)
    x, positions = torch.randn(2, 9, 3, 20, dtype=torch.float64), positions_of(2, 9, 5)
    y = rope(x, positions, inverse_frequencies=frequencies)
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y[..., :8].norm(dim=-1), x[..., :8].norm(dim=-1))
    scaled = rope(x, positions, inverse_frequencies=frequencies, attention_factor=1.25)
    torch.testing.assert_close(scaled[..., :8], 1.25 * y[..., :8])
    assert torch.equal(scaled[..., 8:], x[..., 8:])


@pytest.mark.slow
def test_gradcheck():
    frequencies, _ = rope_frequencies(4, 100.0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 0], [7, 8, 9]], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x: rope(x, positions, inverse_frequencies=frequencies, attention_factor=1.2), x
    )


def test_scores_depend_on_the_distance_alone_even_at_two_million_tokens():
    frequencies, _ = rope_frequencies(64, 10000.0)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(i, j):
        turned = [
            rope(x, torch.tensor([[p]], dtype=torch.int32), inverse_frequencies=frequencies)
            for x, p in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(2_000_117, 2_000_000) == pytest.approx(score(117, 0), abs=1e-4)


def test_bfloat16_turns_in_float32_and_gradients_keep_the_type():
    frequencies, _ = rope_frequencies(16, 10000.0)
    x, positions = torch.randn(1, 33, 2, 16).bfloat16().requires_grad_(), positions_of(1, 33, 5000)
    y = rope(x, positions, inverse_frequencies=frequencies)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rope(x.float(), positions, inverse_frequencies=frequencies).bfloat16())
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


def test_yarn_at_factor_one_changes_nothing():
    frequencies, factor = rope_frequencies(64, 10000.0, RopeScaling("yarn", 1.0, original_length=4096))
    assert factor == 1.0
    torch.testing.assert_close(frequencies, rope_frequencies(64, 10000.0)[0])


LONGROPE = {
    "kind": "longrope",
    "factor": 2.0,
    "original_length": 32,
    "short_factors": [1.0, 2.0],
    "long_factors": [1.5, 4.0],
}


def test_bad_input():
    for settings, message in [
        ({"kind": "su", "factor": 2.0}, "kind must be one of linear, ntk, dynamic, llama3, yarn, longrope; got 'su'"),
        ({"kind": "linear", "factor": 0.5}, "factor must be at least 1"),
        ({"kind": "linear", "factor": math.nan}, "factor must be at least 1"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast must not be given with kind='linear'"),
        ({"kind": "yarn", "factor": 2.0}, "original_length must be given"),
        ({"kind": "llama3", "factor": 2.0, "original_length": 8, "low_frequency_factor": 5.0}, "must be at most"),
        ({"kind": "ntk", "factor": 2.0, "length": 3}, "length must not be given with kind='ntk'"),
        ({"kind": "dynamic", "factor": 2.0, "original_length": 3, "length": 0}, "length must be at least 1; got 0"),
        ({"kind": "longrope", "factor": 2.0, "original_length": 3, "long_factors": [1.0]}, "short_factors must be giv"),
        (LONGROPE | {"short_factors": [0.0, 1.0]}, r"short_factors must be positive numbers; got \[0.0, 1.0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            RopeScaling(**settings)
    with pytest.raises(ValueError, match="dim must be even"):
        rope_frequencies(7, 10000.0)
    with pytest.raises(ValueError, match="dim must be at least 4 with scaling kind ntk; got 2"):
        rope_frequencies(2, 10000.0, RopeScaling("ntk", 2.0))
    with pytest.raises(ValueError, match="short_factors must be one for each pair of the 8 dims that turn, 4; got 2"):
        rope_frequencies(8, 10000.0, RopeScaling(**LONGROPE))
    frequencies, _ = rope_frequencies(8, 10000.0)
    with pytest.raises(ValueError, match="at most half"):
        rope(torch.ones(1, 2, 1, 6), positions_of(1, 2), inverse_frequencies=frequencies)
    with pytest.raises(ValueError, match="one per token"):
        rope(torch.ones(1, 2, 1, 8), positions_of(1, 3), inverse_frequencies=frequencies)
