"""Each mixer against its definition: published code where there is some, a loop over tokens where not."""

import pytest
import torch
from definitions import definitions_of
from model_presets import randomise
from oracles import assert_agrees, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.models.mixers.linear.gated_linear_attention import GatedLinearAttention
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.linear.retnet import RetNet
from longreach.models.mixers.softmax.cosine_attention import CosineAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import Sequence

WIDTH, LENGTH = 32, 21
PLAIN = "plain recurrence of the paper"


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def whole(batch=2, length=LENGTH):
    return Sequence.single(Documents.whole(batch, length))


def assert_same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_definition(name, oracle, mixer, definition, tolerance=1e-9):
    """Output, and the gradients of the input and of every parameter."""
    x, parameters = draw(2, LENGTH, WIDTH), list(mixer.parameters())
    actual = with_gradients(lambda x: mixer(x, whole()), x, parameters)
    assert_agrees(name, oracle, actual, with_gradients(definition, x, parameters), tolerance=tolerance)


@pytest.mark.parametrize(("layer", "depth"), [(0, 80), (7, 8), (3, 8), (0, 1)])
def test_lightning_slopes_are_minimax_01s(layer, depth):
    mixer = LightningAttention(width=64, heads=8, layer=layer, depth=depth)
    factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5
    expected = [2 ** (-8 * (h + 1) / 8) * factor for h in range(8)]
    assert_same(mixer.slopes(draw(1)), torch.tensor(expected, dtype=torch.float64), 1e-14)
    assert mixer.slopes(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert len(set(expected)) == 8


def test_lightning_slopes_of_64_heads_span_the_published_range():
    slopes = LightningAttention(width=64, heads=64, layer=0, depth=80).slopes(draw(1))
    assert slopes[0].item() == pytest.approx(0.917, abs=1e-3)
    assert slopes[-1].item() == pytest.approx(0.0039, abs=1e-4)


def test_lightning_attention_is_the_one_in_transformers():
    modeling = definitions_of("minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, head_dim=6, num_hidden_layers=4, block_size=8,
        layer_types=["linear_attention"] * 4, hidden_act="silu",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx=1).double()
    with torch.no_grad():
        theirs.norm.weight.normal_(1.0, 0.2)
    query_decay, key_decay, diagonal_decay = theirs.decay_factors(theirs.get_slope_rate().double())
    theirs.slope_rate, theirs.query_decay = theirs.get_slope_rate().double(), query_decay
    theirs.key_decay, theirs.diagonal_decay = key_decay, diagonal_decay

    ours = LightningAttention(width=WIDTH, heads=4, layer=1, depth=4, head_dim=6, norm_eps=theirs.norm.variance_epsilon)
    fused = theirs.qkv_proj.weight.detach().unflatten(0, (4, 3, 6))  # each head's q, k and v follow one another
    ours.load_state_dict(
        {
            **{
                name: fused[:, i].flatten(0, 1) for i, name in enumerate(("query.weight", "key.weight", "value.weight"))
            },
            "gate.weight": theirs.output_gate.weight.detach(),
            "norm.weight": theirs.norm.weight.detach(),
            "output.weight": theirs.out_proj.weight.detach(),
        }
    )
    x = draw(2, LENGTH, WIDTH)
    parameters = [layer.weight for layer in (ours.double().gate, ours.norm, ours.output)]
    actual = with_gradients(lambda x: ours(x, whole()), x, parameters)
    parameters = [layer.weight for layer in (theirs.output_gate, theirs.norm, theirs.out_proj)]
    expected = with_gradients(lambda x: theirs(x, None, None)[0], x, parameters)
    # Theirs takes its slopes and the norm's statistics in float32.
    name = "transformers, MiniMaxLightningAttention"
    assert_agrees("lightning_attention", name, actual, expected, tolerance=1e-6)


def test_lightning_attention_is_ring_linears():
    mixer = LightningAttention(
        width=WIDTH, heads=4, layer=1, depth=4, silu=False, qk_norm=True, rope_base=500.0, rope_fraction=0.5,
        norm_groups=2, norm_eps=1e-5,
    ).double()  # fmt: skip
    randomise(mixer)

    def rms(x, weight):
        return F.rms_norm(x, x.shape[-1:], eps=1e-5) * weight

    def rotated(x):
        angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(2) / 2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def by_definition(x):
        q, k, v = (each(x).unflatten(-1, (4, 8)) for each in (mixer.query, mixer.key, mixer.value))
        q, k = rotated(rms(q, mixer.query_norm.weight)), rotated(rms(k, mixer.key_norm.weight))
        state, outputs = x.new_zeros(2, 4, 8, 8), []
        for t in range(LENGTH):
            state = (-mixer.slopes(x).double()).exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        out = torch.stack(outputs, 1).flatten(-2).unflatten(-1, (2, 16))
        out = rms(out, mixer.norm.weight.view(2, 16)).flatten(-2) * torch.sigmoid(mixer.gate(x))
        return mixer.output(out)

    assert_definition("lightning_attention", PLAIN, mixer, by_definition)
    with pytest.raises(ValueError, match="norm_groups must divide heads=4; got 3"):
        LightningAttention(width=WIDTH, heads=4, layer=1, depth=4, norm_groups=3)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_softmax_attention_is_the_one_in_transformers_llama(kv_heads):
    modeling = definitions_of("llama")
    config = modeling.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.LlamaAttention(config, layer_idx=0).double()
    ours = SoftmaxAttention(width=WIDTH, heads=4, kv_heads=kv_heads, rope_base=500.0).double()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    ours.load_state_dict({f"{a}.weight": getattr(theirs, b).weight.detach() for a, b in names.items()})
    x, positions = draw(2, LENGTH, WIDTH), torch.arange(LENGTH)[None]
    rotary = modeling.LlamaRotaryEmbedding(config)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    # Theirs takes the softmax in float32.
    assert_agrees(
        "softmax_attention",
        "transformers, LlamaAttention",
        with_gradients(lambda x: ours(x, whole()), x, [getattr(ours, name).weight for name in names]),
        with_gradients(
            lambda x: theirs(x, rotary(x, positions), mask)[0],
            x,
            [getattr(theirs, name).weight for name in names.values()],
        ),
        tolerance=1e-6,
    )


def test_sliding_window_attention_is_the_one_in_transformers_qwen3():
    modeling = definitions_of("qwen3")
    config = modeling.Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.Qwen3Attention(config, layer_idx=0).double()
    with torch.no_grad():
        theirs.q_norm.weight.normal_(1.0, 0.2)
        theirs.k_norm.weight.normal_(1.0, 0.2)
    ours = SoftmaxAttention(
        width=WIDTH, heads=4, kv_heads=2, head_dim=6, rope_base=500.0, window=5, qk_norm="head",
        norm_eps=config.rms_norm_eps,
    ).double()  # fmt: skip
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    names |= {"query_norm": "q_norm", "key_norm": "k_norm"}
    ours.load_state_dict({f"{a}.weight": getattr(theirs, b).weight.detach() for a, b in names.items()})
    x, positions = draw(2, LENGTH, WIDTH), torch.arange(LENGTH)[None]
    turned = modeling.Qwen3RotaryEmbedding(config)(x, positions)
    behind = positions.mT - positions
    hidden = (behind < 0) | (behind >= 5)
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    # Theirs takes norms and the softmax in float32.
    assert_agrees(
        "sliding_window_attention",
        "transformers, Qwen3Attention",
        with_gradients(lambda x: ours(x, whole()), x, [getattr(ours, name).weight for name in names]),
        with_gradients(
            lambda x: theirs(x, turned, mask)[0], x, [getattr(theirs, name).weight for name in names.values()]
        ),
        tolerance=1e-6,
    )


@pytest.mark.parametrize("window", [None, 9])
def test_dilated_attention_is_softmax_attention_of_every_third_key(window):
    mixer = SoftmaxAttention(width=WIDTH, heads=4, kv_heads=2, rope_base=None, dilation=3, window=window).double()
    behind = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (behind >= 0) & (behind % 3 == 0) & (behind < (window or LENGTH))

    def definition(x):
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (mixer.query, mixer.key, mixer.value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return mixer.output(out.transpose(1, 2).flatten(-2))

    assert_definition("dilated_attention", "torch, scaled_dot_product_attention", mixer, definition)


def test_half_rotation_moves_half_of_a_head_and_no_positions_none():
    x = draw(1, LENGTH, WIDTH)
    late = Sequence.single(Documents.whole(1, LENGTH, position=0))
    plain = SoftmaxAttention(width=WIDTH, heads=4, rope_base=None).double()
    assert plain.rotary is None
    half = SoftmaxAttention(width=WIDTH, heads=4, rope_fraction=0.5).double()
    assert half.rotary is not None
    heads = draw(1, LENGTH, 4, 8)
    turned = half.rotary(heads, late)
    assert_same(turned[..., 4:], heads[..., 4:], 0)
    assert (turned[:, 1:, :, :4] != heads[:, 1:, :, :4]).any()
    # Without positions attention is blind to order: the last token sees the same set.
    order = torch.cat(
        [torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(0)), torch.tensor([LENGTH - 1])]
    )
    assert_same(plain(x[:, order], late)[:, -1], plain(x, late)[:, -1])


@pytest.mark.parametrize("qk_norm", ["head", "unweighted", "full"])
def test_query_key_norm_spans_a_head_or_all(qk_norm):
    sizes = {"width": WIDTH, "heads": 4, "kv_heads": 2, "scale": 0.3}
    mixer = SoftmaxAttention(**sizes, qk_norm=qk_norm, rope_base=None, norm_eps=1e-5).double()
    assert (mixer.query_norm.weight is None) == (qk_norm == "unweighted")
    for weight in mixer.query_norm.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.2)
    x = draw(1, LENGTH, WIDTH)
    q, k = mixer.query(x), mixer.key(x)
    if qk_norm != "full":
        q, k = q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8))
    q = F.rms_norm(q, q.shape[-1:], mixer.query_norm.weight, 1e-5).reshape(1, LENGTH, 4, 8)
    k = F.rms_norm(k, k.shape[-1:], mixer.key_norm.weight, 1e-5).reshape(1, LENGTH, 2, 8)
    v = mixer.value(x).unflatten(-1, (2, 8))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True, scale=0.3
    )
    assert_same(mixer(x, whole(1)), mixer.output(out.transpose(1, 2).flatten(-2)))


def test_window_and_sinks_reach_the_mask():
    mixer = SoftmaxAttention(width=WIDTH, heads=4, window=5, sink_tokens=2)
    assert mixer.mask == Mask(window=5, sink_tokens=2)


def recurrent(q, k, v, log_decay, scale):
    """o_t = scale q_t S_t with S_t = diag(e^g_t) S_(t-1) + k_t^T v_t, one token at a time."""
    state, out = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=v.dtype), []
    for t in range(q.shape[1]):
        state = log_decay[:, t].exp()[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, dim=1)


def test_gated_linear_attention_is_its_recurrence():
    mixer = GatedLinearAttention(width=WIDTH, heads=4, gate_rank=3, norm_eps=1e-5).double()
    torch.nn.init.normal_(mixer.decay.up.bias)
    torch.nn.init.normal_(mixer.norm.weight, 1.0, 0.2)
    assert (mixer.key_dim, mixer.value_dim) == (4, 8)

    def definition(x):
        q, k, v = (part(x).unflatten(-1, (4, -1)) for part in (mixer.query, mixer.key, mixer.value))
        down, up = mixer.decay.down, mixer.decay.up
        gates = F.logsigmoid(x @ down.weight.T @ up.weight.T + up.bias) / 16
        out = recurrent(q, k, v, gates.unflatten(-1, (4, 4)), scale=0.5)
        normed = F.rms_norm(out, (8,), mixer.norm.weight, 1e-5).flatten(-2)
        return mixer.output(normed * F.silu(mixer.gate(x)))

    assert_definition("gated_linear_attention", PLAIN, mixer, definition)


def test_retnet_is_its_recurrence():
    mixer = RetNet(width=WIDTH, heads=4, norm_eps=1e-5).double()
    torch.nn.init.normal_(mixer.norm.weight, 1.0, 0.2)
    torch.nn.init.normal_(mixer.norm.bias, 0.0, 0.2)
    assert (mixer.key_dim, mixer.value_dim) == (8, 16)

    def definition(x):
        q, k, v = (part(x).unflatten(-1, (4, -1)) for part in (mixer.query, mixer.key, mixer.value))
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        q, k = (torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).mT.flatten(-2) for x in (q, k))
        gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
        out = recurrent(q, k, v, gamma.log()[None, None, :, None].expand(2, LENGTH, 4, 8), scale=8**-0.5)
        normed = F.group_norm(out.reshape(-1, 64), 4, mixer.norm.weight, mixer.norm.bias, 1e-5).view(2, LENGTH, 64)
        return mixer.output(normed * F.silu(mixer.gate(x)))

    # The angles of the op are float32.
    assert_definition("retnet", PLAIN, mixer, definition, 1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftmaxAttention(width=32, heads=5), "heads must divide width=32; got 5"),
        (lambda: SoftmaxAttention(width=32, heads=4, kv_heads=3), "kv_heads must divide heads=4; got 3"),
        (lambda: SoftmaxAttention(width=32, heads=4, rope_base=None, rope_fraction=0.5), "must come with a rope_base"),
        (lambda: SoftmaxAttention(width=32, heads=4, rope_fraction=0.3), "rope_fraction must leave an even number"),
        (lambda: SoftmaxAttention(width=32, heads=4, rope_base=-1.0), "rope_base must be positive"),
        (
            lambda: SoftmaxAttention(width=32, heads=4, qk_norm="all"),
            "qk_norm must be one of None, head, unwei",
        ),
        (lambda: SoftmaxAttention(width=32, heads=4, scale=0.0), "scale must be more than 0; got 0.0"),
        (lambda: CosineAttention(width=32, heads=4, scale=0.5), "scale must be null, since each head"),
        (lambda: SoftmaxAttention(width=32, heads=4, sink_tokens=4), "sink_tokens must come with a window"),
        (lambda: LightningAttention(width=32, heads=0, layer=0, depth=1), "heads must divide width=32; got 0"),
        (lambda: GatedLinearAttention(width=36, heads=8), "heads must divide width=36; got 16"),
        (
            lambda: GatedLinearAttention(width=32, heads=4, gate_rank=0),
            "gate_rank and gate_normaliser must be positive",
        ),
        (lambda: RetNet(width=32, heads=3), "heads must divide width=32; got 3"),
        (lambda: RetNet(width=32, heads=4, norm="layer"), "norm must be one of group, rms; got 'layer'"),
        (lambda: RetNet(width=36, heads=4), "must leave an even number of a head's 9 dims"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
