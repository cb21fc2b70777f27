"""Kernel attention against its definitions: whole matrices of weights, loops over tokens, and published code."""

import copy
import math
from functools import partial

import pytest
import torch
from distributed import run_threads
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.models.layers.feature_maps import PositiveRandomFeatures
from longreach.models.mixer import construct
from longreach.models.mixers.kernel.cosformer import CosFormer
from longreach.models.mixers.kernel.fast_weights import FastWeights
from longreach.models.mixers.kernel.hedgehog import Hedgehog
from longreach.models.mixers.kernel.linear_attention import LinearAttention
from longreach.models.mixers.kernel.performer import Performer
from longreach.models.mixers.kernel.polaformer import PolaFormer
from longreach.models.mixers.kernel.relu_linear_attention import ReLULinearAttention
from longreach.models.mixers.kernel.rfa import RFA
from longreach.models.mixers.kernel.transnormer import TransNormer
from longreach.models.mixers.kernel.transnormer_llm import TransNormerLLM
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategy import Strategy

WIDTH, LENGTH = 32, 21
SIZES = {"width": WIDTH, "heads": 4, "kv_heads": 2, "key_dim": 6, "value_dim": 10}
PAPER = "matrix of weights by the paper's definition"


def made(kind, **settings):
    mixer = kind(**{**SIZES, **settings}).double()
    randomise(mixer)
    return mixer


def projected(mixer, x):
    """Queries, keys and values of every head, `[B, T, H, …]`."""
    q, k = (layer(x).unflatten(-1, (-1, mixer.key_dim)) for layer in (mixer.query, mixer.key))
    v = mixer.value(x).unflatten(-1, (-1, mixer.value_dim))
    return q, *(part.repeat_interleave(mixer.heads // mixer.kv_heads, dim=2) for part in (k, v))


def products(q, k, causal=True):
    weights = torch.einsum("bthf,bshf->bhts", q, k)
    return weights.tril() if causal else weights


def mean_of(weights, v):
    """0 where all weights are 0."""
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True).clamp(min=1e-200), v)


def check(name, mixer, definition, *, oracle=PAPER, tolerance=1e-9, batch=2, length=LENGTH):
    x, parameters = draw(batch, length, WIDTH), list(mixer.parameters())
    actual = with_gradients(lambda x: mixer(x, whole(batch, length)), x, parameters)
    assert_agrees(name, oracle, actual, with_gradients(definition, x, parameters), tolerance=tolerance)


def by_weights(mixer, kernel, causal=True):
    def definition(x):
        q, k, v = projected(mixer, x)
        return mixer.output(mean_of(products(*kernel(q, k), causal), v).flatten(-2))

    return definition


def elu_plus_one(q, k):
    return F.elu(q) + 1, F.elu(k) + 1


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_is_its_matrix(causal):
    mixer = made(LinearAttention, causal=causal, bias=True)
    check("linear_attention", mixer, by_weights(mixer, elu_plus_one, causal))


def naive(mixer, kernel):
    published = pytest.importorskip("fla.ops.linear_attn.naive", reason="needs the extra oracles")

    def definition(x):
        q, k, v = projected(mixer, x)
        out, _ = published.naive_recurrent_linear_attn(*kernel(q, k), v, scale=1.0, normalize=True)
        return mixer.output(out.flatten(-2))

    return definition


ORACLE = "flash-linear-attention, naive_recurrent_linear_attn"  # which computes in float32


@pytest.mark.slow  # its import
def test_linear_attention_is_published():
    mixer = made(LinearAttention)
    check("linear_attention", mixer, naive(mixer, elu_plus_one), oracle=ORACLE, tolerance=1e-5)


@pytest.mark.slow  # its import
def test_fast_weights_have_published_features():
    published = pytest.importorskip("fla.modules.feature_map", reason="needs the extra oracles")
    mixer, feature_map = made(FastWeights, nu=3), published.DPFPFeatureMap(6, nu=3)
    oracle = "flash-linear-attention, DPFPFeatureMap"
    kernel = lambda q, k: (feature_map(q), feature_map(k))  # noqa: E731
    check("fast_weights", mixer, by_weights(mixer, kernel), oracle=oracle)
    check("fast_weights", mixer, naive(mixer, kernel), oracle=ORACLE, tolerance=1e-5)


def test_fast_weights_are_products_of_neighbours():
    x = draw(1, 1, 1, 3)
    r = torch.cat([x, -x], dim=-1).clamp(min=0).flatten()
    expected = [r[i] * r[(i - j) % 6] for j in (1, 2) for i in range(6)]
    features = FastWeights(width=12, heads=4, nu=2).feature_map.features(x, whole(1, 1))
    torch.testing.assert_close(features.flatten(), torch.stack(expected))


@pytest.mark.slow  # its import
def test_hedgehog_has_published_features():
    published = pytest.importorskip("fla.modules.feature_map", reason="needs the extra oracles")
    mixer, feature_map = made(Hedgehog), published.HedgehogFeatureMap(6).double()

    def mapped(x, weight, bias):
        heads = [{"layer.weight": w, "layer.bias": b} for w, b in zip(weight, bias, strict=True)]
        call = torch.func.functional_call
        return torch.stack([call(feature_map, each, (x[:, :, h],)) for h, each in enumerate(heads)], dim=2)

    def kernel(q, k):
        made, weights = mixer.feature_map, (mixer.feature_map.key_weight, mixer.feature_map.key_bias)
        shared = [each.repeat_interleave(2, dim=0) for each in weights]
        return mapped(q, made.query_weight, made.query_bias), mapped(k, *shared)

    check("hedgehog", mixer, by_weights(mixer, kernel), oracle="flash-linear-attention, HedgehogFeatureMap")


def test_a_new_hedgehog_map_is_the_identity():
    feature_map = Hedgehog(**SIZES).feature_map
    for name, parameter in feature_map.named_parameters():
        feature_map.initialise_parameter(name, parameter.data, torch.Generator())
    x = draw(1, 3, 4, 6).float()
    features = feature_map(x, x[:, :, :2], whole(1, 3))
    torch.testing.assert_close(features.q, torch.cat([2 * x, -2 * x], dim=-1).softmax(-1))


@pytest.mark.parametrize("causal", [True, False])
def test_relu_linear_attention_is_its_matrix(causal):
    mixer = made(ReLULinearAttention, causal=causal)
    check("relu_linear_attention", mixer, by_weights(mixer, lambda q, k: (q.relu(), k.relu()), causal))


def test_without_any_weight_the_output_is_zero():
    mixer = made(ReLULinearAttention, bias=True)
    with torch.no_grad():
        mixer.query.bias.fill_(-1e3)
        mixer.output.bias.zero_()
    results = with_gradients(lambda x: mixer(x, whole(1, 5)), draw(1, 5, WIDTH), [mixer.value.weight])
    assert not any(result.any() for result in results)


def test_cosformer_is_its_matrix():
    mixer = made(CosFormer, max_length=LENGTH)
    distance = torch.arange(LENGTH, dtype=torch.float64)[:, None] - torch.arange(LENGTH)

    def definition(x):
        q, k, v = projected(mixer, x)
        weights = products(q.relu(), k.relu()) * torch.cos(math.pi / 2 * distance / LENGTH)
        return mixer.output(mean_of(weights, v).flatten(-2))

    check("cosformer", mixer, definition)


def test_cosformer_refuses_longer_documents_only():
    mixer, message = made(CosFormer, max_length=9), r"max_length must be .*; got 9 for one of 10 tokens\. Raise it"
    mixer(draw(1, 20, WIDTH), Sequence.single(Documents.from_lengths([[9, 8]], 20)))
    with pytest.raises(ValueError, match=message):
        mixer(draw(1, 20, WIDTH), Sequence.single(Documents.from_lengths([[9, 10]], 20)))
    cache = DecodingCache()
    mixer(draw(1, 9, WIDTH), Sequence.decoding(cache, 1, 9))
    cache.advance(9)
    with pytest.raises(ValueError, match=message):
        mixer(draw(1, 1, WIDTH), Sequence.decoding(cache, 1, 1))


@pytest.mark.slow
def test_a_compiled_cosformer_refuses_longer_documents_too():
    mixer = torch.compile(made(CosFormer, max_length=9), backend="eager", fullgraph=True)
    mixer(draw(1, 20, WIDTH), Sequence.single(Documents.from_lengths([[9, 8]], 20)))
    with pytest.raises(ValueError, match="max_length must be"):
        mixer(draw(1, 20, WIDTH), Sequence.single(Documents.from_lengths([[9, 10]], 20)))


def performer_features(x, projection):
    x = x * x.shape[-1] ** -0.25
    return (torch.einsum("bthk,fk->bthf", x, projection) - x.square().sum(-1, keepdim=True) / 2).exp()


def test_performer_is_its_matrix():
    mixer = made(Performer, seed=3, layer=1, features=15)
    projection = mixer.feature_map.projection
    kernel = lambda q, k: (performer_features(q, projection), performer_features(k, projection))  # noqa: E731
    check("performer", mixer, by_weights(mixer, kernel))


def test_performer_estimates_softmax_attention():
    mixer = made(Performer, seed=0, layer=0, features=5000)
    with torch.no_grad():
        for layer in (mixer.query, mixer.key):
            layer.weight *= 0.3
        q, k, v = projected(mixer, draw(1, 7, WIDTH))
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        out = mixer(draw(1, 7, WIDTH), whole(1, 7))
        expected = mixer.output(expected.transpose(1, 2).flatten(-2))
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_performer_takes_queries_and_keys_of_any_size(dtype):
    mixer = made(Performer, seed=0, layer=0, features=24)
    with torch.no_grad():
        for layer in (mixer.query, mixer.key):
            layer.weight *= 8  # some products are beyond 100, and their exponentials beyond float32
        mixer.to(dtype)
        low = mixer(draw(1, 200, WIDTH).to(dtype), whole(1, 200))
        exact = mixer.double()(draw(1, 200, WIDTH).to(dtype).double(), whole(1, 200))
    assert exact.isfinite().all()
    assert (low.double() - exact).norm() < (1e-4 if dtype == torch.float32 else 0.03) * exact.norm()


def test_random_features_are_drawn_by_seed_and_layer_and_kept():
    def projection(kind, **settings):
        mixer = kind(**{"width": WIDTH, "heads": 4, "seed": 1, "layer": 2, "features": 20, **settings})
        assert "feature_map.projection" in mixer.state_dict()
        return mixer.feature_map.projection

    for kind in (Performer, RFA):
        assert torch.equal(projection(kind), projection(kind))
        for other in (projection(kind, seed=2), projection(kind, layer=3)):
            assert not torch.equal(projection(kind), other)
    rows = projection(Performer).double()
    for block in rows.split(8):
        cosines = F.normalize(block, dim=-1) @ F.normalize(block, dim=-1).T
        torch.testing.assert_close(cosines, torch.eye(len(block), dtype=torch.float64), atol=1e-6, rtol=0)
    many = PositiveRandomFeatures(8, 1, 1, 8000, 0, 0).projection
    assert many.square().sum(-1).mean() == pytest.approx(8, rel=0.05)
    with torch.device("meta"):
        assert projection(Performer).is_meta


def rfa_definition(mixer):
    """The loop of the published code, with a floor in place of its clamp, on features of its definition."""

    def features(x, groups):
        unit = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        random = mixer.feature_map.sigma[:, None] * mixer.feature_map.projection
        random = random.repeat_interleave(mixer.heads // groups, dim=0)
        angle = torch.einsum("bthk,hdk->bthd", unit, random)
        return torch.cat([angle.sin(), angle.cos()], dim=-1) / random.shape[1] ** 0.5

    def definition(x):
        q, k, v = projected(mixer, x)
        q, k = features(q, mixer.kv_heads), features(k, mixer.kv_heads)
        gate = None if mixer.gate is None else torch.sigmoid(mixer.gate(x))
        s, z, outs = 0, 0, []
        for t in range(x.shape[1]):
            old, new = (1.0, 1.0) if gate is None else (gate[:, t, :, None], 1 - gate[:, t, :, None])
            s = (old if gate is None else old[..., None]) * s + torch.einsum("bhf,bhv->bhfv", new * k[:, t], v[:, t])
            z = old * z + new * k[:, t]
            total = torch.einsum("bhf,bhf->bh", q[:, t], z).abs().clamp(min=mixer.floor)
            outs.append(torch.einsum("bhf,bhfv->bhv", q[:, t], s) / total[..., None])
        return mixer.output(torch.stack(outs, dim=1).flatten(-2))

    return definition


@pytest.mark.parametrize("gate", [False, True])
def test_rfa_is_its_recurrence(gate):
    mixer = made(RFA, seed=5, layer=0, features=9, gate=gate)
    check("rfa_gate" if gate else "rfa", mixer, rfa_definition(mixer), oracle="plain recurrence of the paper's code")


def test_rfa_estimates_a_gaussian_kernel():
    feature_map = RFA(**{**SIZES, "kv_heads": 4}, seed=0, layer=0, features=40_000).feature_map.double()
    torch.nn.init.ones_(feature_map.sigma)
    q, k = draw(1, 3, 4, 6), draw(1, 3, 4, 6, seed=1)
    estimate = products(feature_map.features(q, whole(1, 3)), feature_map.features(k, whole(1, 3)), causal=False)
    distance = (F.normalize(q, dim=-1).unsqueeze(2) - F.normalize(k, dim=-1).unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(estimate, (-distance / 2).exp().permute(0, 3, 1, 2), atol=0.02, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_polaformer_is_its_matrix(causal):
    mixer = made(PolaFormer, alpha=3.0, conv_size=3, causal=causal)

    def definition(x):
        q, k, v = projected(mixer, x)
        power, scale = (each.repeat_interleave(2, dim=0) for each in (mixer.feature_map.power, mixer.feature_map.scale))
        power, scale = 1 + 3.0 * torch.sigmoid(power), F.softplus(scale)
        q_plus, q_minus, k_plus, k_minus = (
            (sign * part / scale).relu() ** power for part in (q, k) for sign in (1, -1)
        )
        keys = torch.cat([k_plus, k_minus], dim=-1)
        first, second = v.chunk(2, dim=-1)
        same = mean_of(products(torch.cat([q_plus, q_minus], dim=-1), keys, causal), first)
        opposite = mean_of(products(torch.cat([q_minus, q_plus], dim=-1), keys, causal), second)
        padded = F.pad(mixer.value(x), (0, 0, 2, 0))
        near = sum(padded[:, i : i + LENGTH] * mixer.conv.weight[:, i] for i in range(3))
        near = near.unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
        return mixer.output(mixer.gate(x) * (torch.cat([same, opposite], dim=-1) + near).flatten(-2))

    check("polaformer", mixer, definition)


def test_signs_apart_make_the_product():
    mixer = made(PolaFormer, alpha=0.0)
    torch.nn.init.constant_(mixer.feature_map.scale, math.log(math.e - 1))  # softplus of it is 1
    q, k, _ = projected(mixer, draw(1, 5, WIDTH))
    features = mixer.feature_map(q, k[:, :, ::2], whole(1, 5))
    both = products(features.q, features.k.repeat_interleave(4, dim=2), causal=False).unflatten(1, (4, 2))
    torch.testing.assert_close(both[:, :, 0] - both[:, :, 1], products(q, k, causal=False))


def test_transnormer_is_its_matrix():
    mixer = made(TransNormer, norm_eps=1e-5)

    def definition(x):
        q, k, v = projected(mixer, x)
        out = torch.einsum("bhts,bshv->bthv", products(*elu_plus_one(q, k)), v).flatten(-2)
        return mixer.output(F.rms_norm(out, (40,), mixer.norm.weight, 1e-5))

    check("transnormer", mixer, definition)


@pytest.mark.parametrize(("layer", "rule"), [(0, "geometric"), (3, "geometric"), (3, "arithmetic")])
def test_transnormer_llm_is_its_matrix(layer, rule):
    mixer = made(TransNormerLLM, layer=layer, depth=8, slope_rule=rule, norm_eps=1e-5)
    distance = torch.arange(LENGTH, dtype=torch.float64)[:, None] - torch.arange(LENGTH)
    head = torch.arange(4, dtype=torch.float64)
    slopes = 2 ** (-2 * (head + 1)) * (1 - layer / 7 + 1e-5) if rule == "geometric" else 2 * head * (1 - layer / 8)

    def definition(x):
        q, k, v = projected(mixer, x)
        q, k = F.silu(q), F.silu(k)
        weights = torch.einsum("bthk,bshk->bhtsk", q, k)
        if layer == 0:
            theta = mixer.feature_map.lrpe.theta.repeat_interleave(2, dim=0)
            weights = weights * torch.cos(theta[:, None, None] * distance[..., None])
        weights = weights.sum(-1) * torch.exp(-slopes[:, None, None] * distance).tril()
        out = torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2)
        return mixer.output(mixer.gate(x) * F.rms_norm(out, (40,), None, 1e-5))

    assert (mixer.feature_map.lrpe is not None) == (layer == 0)
    # The published code has the 1e-5 of the slopes at one place, MiniMax-01's at two.
    check("transnormer_llm", mixer, definition, tolerance=1e-4 if rule == "geometric" else 1e-9)


def test_lrpe_starts_as_published():
    mixer = TransNormerLLM(width=WIDTH, heads=4, layer=0, depth=2)
    theta = mixer.feature_map.lrpe.theta.data
    mixer.feature_map.lrpe.initialise_parameter("theta", theta, torch.Generator())
    torch.testing.assert_close(theta, 10000 ** (-2 / 32 * torch.arange(32)).reshape(4, 8))


def test_the_gradient_of_lrpe_is_as_exact_on_ranks_far_into_a_document():
    mixer = made(TransNormerLLM, layer=0, depth=2)
    x, documents, layout = draw(1, 24, WIDTH), Documents.whole(1, 24, position=100_000), Layout(24, 2)

    def gradient(rank, world, mixer, seq):
        mixer.zero_grad()
        mixer(seq.shard(x).to(mixer.output.weight.dtype), seq).square().sum().backward()
        return mixer.feature_map.lrpe.theta.grad.double()

    expected = gradient(0, 1, mixer, Sequence.single(documents))

    def on_ranks(rank, world):
        seq = Sequence.shared(documents, layout, Mesh.create(world), Strategy())
        return gradient(rank, world, copy.deepcopy(mixer).float(), seq)

    total = sum(run_threads(2, on_ranks))
    assert (total - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("layer", [0, 5])
def test_arithmetic_slopes_are_flash_linear_attentions(layer):
    mixer = LightningAttention(width=64, heads=8, layer=layer, depth=12, slope_rule="arithmetic")
    expected = 8 / 8 * (1 - layer / 12) * torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(mixer.slopes(draw(1)), expected)


def test_diag_attention_is_attention_within_blocks():
    mixer = SoftmaxAttention(width=WIDTH, heads=4, block=6, rope_base=None).double()
    alone = SoftmaxAttention(width=WIDTH, heads=4, rope_base=None).double()
    randomise(mixer)
    alone.load_state_dict(mixer.state_dict())
    x, documents = draw(1, 20, WIDTH), Documents.from_lengths([[14, 6]])
    blocks = Documents.from_lengths([[6, 6, 2, 6]])
    expected = with_gradients(lambda x: alone(x, Sequence.single(blocks)), x, alone.parameters())
    actual = with_gradients(lambda x: mixer(x, Sequence.single(documents)), x, mixer.parameters())
    assert_agrees("diag_attention", "softmax attention of each block alone", actual, expected)


def test_a_language_model_refuses_what_sees_the_future():
    settings = {"vocabulary": 9, "width": WIDTH, "depth": 1, "pattern": ["it"]}
    with pytest.raises(ValueError, match=r"model\.mixers\.it\.causal must be true in a language model; got false"):
        LanguageModel(**settings, mixers={"it": lambda width: LinearAttention(width=width, heads=4, causal=False)})


def test_attention_to_whole_documents_has_no_next_token():
    mixer = made(PolaFormer, causal=False, conv_size=None)
    with pytest.raises(ValueError, match="causal must be true to decode; got false"):
        mixer(draw(1, 3, WIDTH), Sequence.decoding(DecodingCache(), 1, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearAttention(width=32, heads=5), "heads must divide width=32; got 5. Change it, or give key_dim"),
        (lambda: LinearAttention(width=32, heads=4, kv_heads=3), "kv_heads must divide heads=4; got 3"),
        (lambda: CosFormer(width=32, heads=4, max_length=0), "max_length must be at least 1; got 0"),
        (lambda: FastWeights(width=32, heads=4, nu=16), "nu must be at least 1 and below twice the key_dim=8; got 16"),
        (lambda: Performer(width=32, heads=4, seed=0, layer=0, features=0), "features must be at least 1; got 0"),
        (lambda: RFA(width=32, heads=4, seed=0, layer=0, features=0), "features must be at least 1; got 0"),
        (lambda: RFA(width=32, heads=4, seed=0, layer=0, floor=0.0), "floor must be positive; got 0.0"),
        (lambda: PolaFormer(width=32, heads=4, value_dim=5), "value_dim must be even; got 5"),
        (lambda: PolaFormer(width=32, heads=4, alpha=-1.0), "alpha must not be negative; got -1.0"),
        (lambda: TransNormerLLM(width=32, heads=4, layer=0, depth=1, slope_rule="x"), "slope_rule must be one of"),
        (lambda: SoftmaxAttention(width=32, heads=4, block=4, window=4), "block must come without window"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["performer", "rfa"])
def test_random_features_need_a_seed(name):
    kind = Performer if name == "performer" else RFA
    with pytest.raises(ValueError, match=f"model.mixers.{name} must give seed; got heads"):
        construct(partial(kind, heads=4), f"model.mixers.{name}", width=32, layer=0)
