"""Softmax attention with other logits against transformers, flash-linear-attention and the papers, every gradient."""

import math

import pytest
import torch
from definitions import definitions_of
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.mixers.softmax.additive_attention import AdditiveAttention
from longreach.models.mixers.softmax.cosine_attention import CosineAttention
from longreach.models.mixers.softmax.differential_attention import DifferentialAttention
from longreach.models.mixers.softmax.forgetting_attention import ForgettingAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention

WIDTH, BATCH, LENGTH = 24, 2, 29
X = draw(BATCH, LENGTH, WIDTH)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PAPER = "dense matrix of the paper"


def made(mixer):
    mixer = mixer.double()
    randomise(mixer)
    return mixer


def assert_is(name, oracle, mixer, other, *, tolerance=1e-9):
    """The mixer is `other(x)`, which uses the mixer's own parameters."""
    parameters = list(mixer.parameters())
    actual = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    assert_agrees(name, oracle, actual, with_gradients(other, X, parameters), tolerance=tolerance)


def softmax(scores, v):
    """Scores `[B, H, T, S]`, v `[B, S, H, V]`."""
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~CAUSAL, -math.inf).softmax(-1), v)


def products(q, k):
    return torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5


def by_head(x, heads):
    return x.unflatten(-1, (heads, -1))


def repeated(x, heads):
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def rms(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


# Forgetting attention


def fox(mixer, attend):
    """The Pro layer, or what is left of it, around `attend(q, k, v, log_forget)`."""

    def shifted(made, x, gate):
        before = F.pad(made, (0, 0, 1, 0))[:, :-1]
        part = torch.sigmoid(F.linear(x, gate)).repeat_interleave(mixer.head_dim, -1)
        return part * before + (1 - part) * made

    def other(x):
        q, k, v = mixer.query(x), mixer.key(x), mixer.value(x)
        if mixer.shift is not None:
            k, v = (shifted(made, x, gate) for made, gate in zip((k, v), mixer.shift.weight.chunk(2), strict=True))
        q, k, v = by_head(q, mixer.heads), by_head(k, mixer.kv_heads), by_head(v, mixer.kv_heads)
        if mixer.qk_norm:
            q, k = rms(q, mixer.query_norm), rms(k, mixer.key_norm)
        out = attend(q, k, v, F.logsigmoid(mixer.forget(x)))
        if mixer.output_norm is not None:
            weight = mixer.output_norm.weight.view(mixer.heads, -1)
            out = F.rms_norm(out, out.shape[-1:], eps=mixer.output_norm.eps) * weight
        gate = 1.0 if mixer.gate is None else torch.sigmoid(mixer.gate.project(x))
        return mixer.output(out.flatten(-2) * gate)

    return other


def forgetting(q, k, v, log_forget):
    """Every sum of logarithms by itself."""
    decay = torch.stack([
        torch.stack([log_forget[:, j + 1 : i + 1].sum(1) for j in range(LENGTH)], 1) for i in range(LENGTH)
    ], 1)  # fmt: skip
    return softmax(products(q, repeated(k, q.shape[2])) + decay.permute(0, 3, 1, 2), repeated(v, q.shape[2]))


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": 2},
        {"kv_shift": False, "output_norm": False},
        {"kv_shift": False, "qk_norm": None, "gate": None},
    ],
)
def test_forgetting_attention_is_that_of_the_paper(settings):
    mixer = made(ForgettingAttention(width=WIDTH, heads=4, **settings))
    assert_is("forgetting_attention", PAPER, mixer, fox(mixer, forgetting))


def test_forgetting_attention_is_that_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.forgetting_attn.naive", reason="needs flash-linear-attention")
    mixer = made(ForgettingAttention(width=WIDTH, heads=4, kv_heads=2))
    oracle = "flash-linear-attention, naive_forgetting_attn"

    def attend(*tensors):  # it computes in float32
        return naive.naive_forgetting_attn(*tensors).double()

    assert_is("forgetting_attention", oracle, mixer, fox(mixer, attend), tolerance=2e-6)


# Differential attention


def differential(mixer, heads, kv_heads):
    def other(x):
        q = by_head(mixer.query(x), 2 * heads).unflatten(2, (kv_heads, 2, -1))  # by value head, part and query head
        k, v = by_head(mixer.key(x), 2 * kv_heads).unflatten(2, (kv_heads, 2)), by_head(mixer.value(x), kv_heads)
        outs = [
            softmax(products(q[:, :, :, p].flatten(2, 3), repeated(k[:, :, :, p], heads)), repeated(v, heads))
            for p in (0, 1)
        ]
        one, two = (mixer.lambda_q1 * mixer.lambda_k1).sum().exp(), (mixer.lambda_q2 * mixer.lambda_k2).sum().exp()
        start = 0.8 - 0.6 * math.exp(-0.3 * 3)
        out = outs[0] - (one - two + start) * outs[1]
        return mixer.output(
            (1 - start) * F.rms_norm(out, out.shape[-1:], mixer.norm.weight, mixer.norm.eps).flatten(-2)
        )

    return other


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_differential_attention_is_that_of_the_paper(kv_heads):
    mixer = made(DifferentialAttention(width=WIDTH, heads=2, kv_heads=kv_heads, layer=3, rope_base=None))
    assert_is("differential_attention", PAPER, mixer, differential(mixer, 2, kv_heads))


def test_differential_attention_is_that_of_transformers():
    modeling = definitions_of("diffllama")
    config = modeling.DiffLlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, head_dim=6, num_hidden_layers=4,
        rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.DiffLlamaAttention(config, layer_idx=3).double()
    mixer = made(DifferentialAttention(width=WIDTH, heads=2, layer=3))
    torch.nn.init.ones_(mixer.norm.weight).requires_grad_(False)  # they have none

    def moved(weight):
        """From pairs of neighbouring heads to theirs, which are two apart: both parts, and both halves of a value."""
        return weight.unflatten(0, (2, 2, 6)).transpose(0, 1).flatten(0, 2)

    parameters = [p for p in mixer.parameters() if p.requires_grad]
    rotary = modeling.DiffLlamaRotaryEmbedding(config)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~CAUSAL, -math.inf)[None, None]

    def other(x):
        positions = rotary(x, torch.arange(LENGTH)[None])
        replaced = {
            "q_proj.weight": moved(mixer.query.weight), "k_proj.weight": moved(mixer.key.weight),
            "v_proj.weight": moved(mixer.value.weight), "o_proj.weight": mixer.output.weight,
            **{name: getattr(mixer, name) for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")},
        }  # fmt: skip
        return torch.func.functional_call(theirs, replaced, (x, positions, mask))[0]

    actual = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    oracle = "transformers, DiffLlamaAttention"  # its softmax and rotation are in float32
    assert_agrees("differential_attention", oracle, actual, with_gradients(other, X, parameters), tolerance=2e-6)


# Sums, cosines, caps and factors


@pytest.mark.parametrize("name", ["additive", "concatenated"])
def test_additive_attention_is_that_of_the_papers(name):
    mixer = made(AdditiveAttention(width=WIDTH, heads=4, kv_heads=2, rope_base=None, score=name))

    def other(x):
        q, k, v = by_head(mixer.query(x), 4), by_head(mixer.key(x), 2), by_head(mixer.value(x), 2)
        sums = q.unsqueeze(2) + repeated(k, 4).unsqueeze(1)
        if name == "additive":
            scores = torch.einsum("btshk,hk->bhts", torch.tanh(sums), mixer.weight)
        else:
            scores = F.leaky_relu(torch.einsum("btshk,hk->bhts", sums, mixer.weight), 0.2)
        return mixer.output(softmax(scores, repeated(v, 4)).flatten(-2))

    assert_is(f"{name}_attention", PAPER, mixer, other)


def test_cosine_attention_is_that_of_the_paper():
    mixer = made(CosineAttention(width=WIDTH, heads=4, kv_heads=2, rope_base=None))
    with torch.no_grad():
        mixer.log_scale[1] = 7.0  # beyond the most

    def other(x):
        q, k, v = by_head(mixer.query(x), 4), by_head(mixer.key(x), 2), by_head(mixer.value(x), 2)
        cosines = torch.einsum(
            "bthk,bshk->bhts", *(a * (a.square().sum(-1, True) + 1e-6).rsqrt() for a in (q, repeated(k, 4)))
        )
        factor = mixer.log_scale.clamp(max=math.log(100)).exp()[:, None, None]
        return mixer.output(softmax(factor * cosines, repeated(v, 4)).flatten(-2))

    assert_is("cosine_attention", PAPER, mixer, other)


def attend_of_transformers(theirs, mixer, **settings):
    """Their attention with the mixer's weights; softmax is in float32 there."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~CAUSAL, -math.inf)[None, None]

    def other(x):
        parts = {"q": mixer.query, "k": mixer.key, "v": mixer.value, "o": mixer.output}
        replaced = {f"{name}_proj.weight": part.weight for name, part in parts.items()}
        unrotated = torch.ones(BATCH, LENGTH, 6).to(x), torch.zeros(BATCH, LENGTH, 6).to(x)
        given = {"position_embeddings": unrotated, "attention_mask": mask, **settings}
        return torch.func.functional_call(theirs.double(), replaced, (x,), given)[0]

    return other


SIZES = {
    "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 4,
    "attn_implementation": "eager",
}  # fmt: skip


def test_soft_capping_is_that_of_gemma_2_in_transformers():
    modeling = definitions_of("gemma2")
    config = modeling.Gemma2Config(**SIZES, attn_logit_softcapping=0.5, query_pre_attn_scalar=6)
    theirs = modeling.Gemma2Attention(config, layer_idx=1).eval()
    mixer = made(SoftmaxAttention(width=WIDTH, heads=4, kv_heads=2, rope_base=None, softcap=0.5))
    other = attend_of_transformers(theirs, mixer)
    assert_is("softmax_attention", "transformers, Gemma2Attention's soft capping", mixer, other, tolerance=2e-6)


def test_the_temperature_is_that_of_llama_4_in_transformers():
    modeling = definitions_of("llama4")
    config = modeling.Llama4TextConfig(
        **SIZES, attn_temperature_tuning=True, attn_scale=0.3, floor_scale=4, no_rope_layers=[0, 0, 0, 0]
    )
    theirs = modeling.Llama4TextAttention(config, layer_idx=1)
    settings = {"temperature": 0.3, "temperature_length": 4}
    mixer = made(SoftmaxAttention(width=WIDTH, heads=4, kv_heads=2, rope_base=None, **settings))
    places = {"position_ids": torch.arange(LENGTH)[None].expand(BATCH, -1)}
    other = attend_of_transformers(theirs, mixer, position_embeddings=None, past_key_values=None, **places)
    assert_is("softmax_attention", "transformers, Llama4TextAttention's temperature", mixer, other, tolerance=2e-6)


def test_logits_are_scaled_by_the_logarithm_of_the_length():
    mixer = made(SoftmaxAttention(width=WIDTH, heads=4, rope_base=None, log_length=16, softcap=2.0))

    def other(x):
        q, k, v = (by_head(part(x), 4) for part in (mixer.query, mixer.key, mixer.value))
        factor = torch.arange(1.0, LENGTH + 1, dtype=torch.float64).log() / math.log(16)
        scores = 2.0 * torch.tanh(factor[:, None] * products(q, k) / 2.0)
        return mixer.output(softmax(scores, v).flatten(-2))

    assert_is("softmax_attention", "dense matrix, log n", mixer, other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"softcap": -1.0}, "softcap must be more than 0"),
        ({"log_length": 1}, "log_length must be at least 2"),
        ({"temperature": 0.1}, "temperature and temperature_length must come together"),
        ({"temperature": 0.1, "temperature_length": 0}, "temperature_length must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(ValueError, match=said):
        SoftmaxAttention(width=WIDTH, heads=4, **settings)
