"""Elementwise mixers and Longhorn against other people's modules or the papers' recurrences, with every gradient."""

import pytest
import torch
from definitions import definitions_of
from model_presets import randomise, small_hybrid
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.mixers.elementwise.aft_full import AFTFull
from longreach.models.mixers.elementwise.aft_simple import AFTSimple
from longreach.models.mixers.elementwise.gated_short_convolution import GatedShortConvolution
from longreach.models.mixers.elementwise.hgrn import HGRN
from longreach.models.mixers.elementwise.rg_lru import RGLRU
from longreach.models.mixers.state_space.longhorn import Longhorn
from longreach.parallel.sequence import Sequence

WIDTH, BATCH, LENGTH = 24, 2, 37
X = draw(BATCH, LENGTH, WIDTH)
PAPER = "plain recurrence of the paper"


def assert_is(name, oracle, mixer, other, *, tolerance=1e-9):
    """The mixer is `other(x)`, which uses the mixer's own parameters."""
    parameters = list(mixer.parameters())

    def ours(x):
        out = mixer(x, whole(BATCH, LENGTH))
        return out[0] if mixer.publishes else out

    assert_agrees(
        name,
        oracle,
        with_gradients(ours, X, parameters),
        with_gradients(other, X, parameters),
        tolerance=tolerance,
    )


def made(mixer):
    mixer = mixer.double()
    randomise(mixer)
    return mixer


def convolved(x, weight, bias):
    taps = weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return sum(padded[:, back : back + x.shape[1]] * weight[:, back] for back in range(taps)) + bias


def test_gated_short_convolution_is_that_of_lfm2():
    modeling = definitions_of("lfm2")
    config = modeling.Lfm2Config(hidden_size=WIDTH, num_hidden_layers=1, layer_types=["conv"], conv_bias=True)
    theirs = made(modeling.Lfm2ShortConv(config, 0))
    ours = made(GatedShortConvolution(width=WIDTH, bias=True))
    joined = ours.input_gate, ours.output_gate, ours.value
    with torch.no_grad():
        for part, name in ((part, name) for name in ("weight", "bias") for part in ("in_proj", "conv", "out_proj")):
            to = {
                "in_proj": torch.cat([getattr(layer, name) for layer in joined]),
                "conv": getattr(ours.conv, name),
                "out_proj": getattr(ours.output, name),
            }[part]
            parameter = theirs.get_parameter(f"{part}.{name}")
            parameter.copy_(to.view(parameter.shape))
    own = [getattr(layer, name) for name in ("weight", "bias") for layer in (*joined, ours.conv, ours.output)]
    actual = with_gradients(lambda x: ours(x, whole(BATCH, LENGTH)), X, own)
    actual = [*actual[:2], torch.cat(actual[2:5]), *actual[5:7], torch.cat(actual[7:10]), *actual[10:]]
    parts = (theirs.in_proj, theirs.conv, theirs.out_proj)
    expected = with_gradients(theirs, X, [getattr(part, name) for name in ("weight", "bias") for part in parts])
    expected[3] = expected[3].squeeze(1)
    assert_agrees("gated_short_convolution", "transformers, Lfm2ShortConv", actual, expected)


def test_rg_lru_is_the_recurrent_block_of_recurrentgemma():
    modeling = definitions_of("recurrent_gemma")
    config = modeling.RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=30, num_attention_heads=3, num_hidden_layers=1)
    theirs = made(modeling.RecurrentGemmaRecurrentBlock(config, 0))
    ours = made(RGLRU(width=WIDTH, inner=30, blocks=3))
    names = {
        "recurrence_gate.weight": "rg_lru.recurrent_gate_weight", "recurrence_bias": "rg_lru.recurrent_gate_bias",
        "input_gate.weight": "rg_lru.input_gate_weight", "input_bias": "rg_lru.input_gate_bias",
        "Lambda": "rg_lru.recurrent_param",
        "value.weight": "linear_x.weight", "value.bias": "linear_x.bias",
        "gate.weight": "linear_y.weight", "gate.bias": "linear_y.bias",
        "conv.weight": "conv_1d.weight", "conv.bias": "conv_1d.bias",
        "output.weight": "linear_out.weight", "output.bias": "linear_out.bias",
    }  # fmt: skip
    keys = [name for name, _ in ours.named_parameters()]
    parameters = [theirs.get_parameter(names[key]) for key in keys]

    def as_ours(key, tensor):
        """Their blocks are [in, out]."""
        tensor = tensor.mT if key in ("recurrence_gate.weight", "input_gate.weight") else tensor
        return tensor.reshape(ours.get_parameter(key).shape)

    with torch.no_grad():
        for key, parameter in zip(keys, parameters, strict=True):
            if key == "recurrence_bias":
                parameter[0, :4] -= 30  # nothing decays, and the root has the largest slope
            ours.get_parameter(key).copy_(as_ours(key, parameter))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    actual = with_gradients(lambda x: ours(x, whole(BATCH, LENGTH)), X, ours.parameters())
    expected = with_gradients(lambda x: theirs(x, positions, None, use_cache=False)[0], X, parameters)
    expected[2:] = [as_ours(key, gradient) for key, gradient in zip(keys, expected[2:], strict=True)]
    assert_agrees(
        "rg_lru", "transformers, RecurrentGemmaRecurrentBlock", actual, expected, tolerance=1e-6
    )  # their state is float32


def test_rg_lru_is_the_recurrence_of_the_paper():
    mixer = made(RGLRU(width=WIDTH, inner=30, blocks=3))

    def other(x):
        value = convolved(mixer.value(x), mixer.conv.weight, mixer.conv.bias)
        r = torch.sigmoid(value @ torch.block_diag(*mixer.recurrence_gate.weight).T + mixer.recurrence_bias)
        i = torch.sigmoid(value @ torch.block_diag(*mixer.input_gate.weight).T + mixer.input_bias)
        decay = torch.exp(-8 * F.softplus(mixer.Lambda) * r)
        h, outputs = torch.zeros(BATCH, 30, dtype=x.dtype), []
        for t in range(LENGTH):
            root = torch.sqrt(1 - decay[:, t] ** 2) if t else 1.0
            h = decay[:, t] * h + root * i[:, t] * value[:, t]
            outputs.append(h)
        return mixer.output(torch.stack(outputs, 1) * F.gelu(mixer.gate(x), approximate="tanh"))

    assert_is("rg_lru", PAPER, mixer, other)


def test_rg_lru_has_slopes_where_nothing_decays():
    mixer = made(RGLRU(width=WIDTH, blocks=3)).float()
    with torch.no_grad():
        mixer.Lambda.fill_(-200.0)
    for tensor in with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X.float(), mixer.parameters()):
        assert tensor.isfinite().all()


def test_rg_lru_starts_with_states_that_last():
    mixer, value = RGLRU(width=4096, blocks=4), torch.empty(4096)
    assert mixer.initialise_parameter("Lambda", value, torch.Generator().manual_seed(0))
    squares = torch.exp(-2 * F.softplus(value))
    assert squares.min() >= 0.9**2 - 1e-5
    assert squares.max() <= 0.999**2 + 1e-5
    assert squares.mean() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=3e-3)


@pytest.mark.parametrize("layer", [0, 2])
def test_hgrn_is_the_recurrence_of_flash_linear_attention(layer):
    naive = pytest.importorskip("fla.ops.hgrn.naive", reason="needs flash-linear-attention").naive_recurrent_hgrn
    mixer = made(HGRN(width=WIDTH, layer=layer, depth=4, expansion=1.25))

    def other(x):
        shares = mixer.bounds.weight.softmax(0)
        bound = (shares.cumsum(0) - shares[0])[layer]
        forget = bound + (1 - bound) * torch.sigmoid(mixer.forget(x))
        h = naive(F.silu(mixer.value(x)) * (1 - forget), forget.log())[0]  # computes in float32
        normed = F.rms_norm(h, h.shape[-1:], mixer.norm.weight, mixer.norm.eps)
        return mixer.output(normed * F.silu(mixer.gate(x)))

    if layer == 0:  # bound by 0, whatever the parameters
        mixer.bounds.weight.requires_grad_(False)
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
    actual = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH))[0], X, parameters)
    expected = with_gradients(other, X, parameters)
    assert_agrees("hgrn", "flash-linear-attention, naive_recurrent_hgrn", actual, expected, tolerance=1e-6)


def test_hgrn_shares_bounds_that_rise_with_depth():
    model = small_hybrid("hgrn")
    first, second = model.mixers[0], model.mixers[2]
    assert second.bounds is None
    torch.nn.init.zeros_(first.bounds.weight)
    torch.testing.assert_close(first.bounds()[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64))
    tokens = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    model(tokens, whole(1, 9), tokens)[0].backward()
    assert (first.bounds.weight.grad.abs().amax(1) > 0).all()  # through the second


def test_hgrn_opens_no_gate_beyond_its_float():
    """Neither a closed gate nor a bound of 0 makes an infinite logarithm or a gradient that is no number."""
    mixer = made(HGRN(width=WIDTH, layer=0, depth=4)).float()
    with torch.no_grad():
        mixer.forget.weight.mul_(1e4)
    parameters = mixer.parameters()
    for tensor in with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH))[0], X.float(), parameters):
        assert tensor.isfinite().all()


def test_aft_simple_is_the_sum_of_the_paper():
    mixer = made(AFTSimple(width=WIDTH, inner=30))

    def other(x):
        k, v = mixer.key(x).exp(), mixer.value(x)
        outputs = [(k * v)[:, : t + 1].sum(1) / k[:, : t + 1].sum(1) for t in range(LENGTH)]
        return mixer.output(mixer.query(x).sigmoid() * torch.stack(outputs, 1))

    assert_is("aft_simple", PAPER, mixer, other)


def test_aft_full_is_the_sum_of_the_paper():
    mixer = made(AFTFull(width=WIDTH, inner=30, max_length=40, rank=5))

    def other(x):
        bias = (mixer.row @ mixer.column.T)[:LENGTH, :LENGTH]
        k, v, outputs = mixer.key(x), mixer.value(x), []
        for t in range(LENGTH):
            weights = torch.exp(k[:, : t + 1] + bias[t, : t + 1, None])
            outputs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
        return mixer.output(mixer.query(x).sigmoid() * torch.stack(outputs, 1))

    assert_is("aft_full", PAPER, mixer, other)


def test_aft_full_names_a_document_that_is_too_long():
    mixer = made(AFTFull(width=WIDTH, max_length=20))
    packed = Sequence.single(Documents.from_lengths([[20, 17], [5, 19, 13]], LENGTH))
    assert mixer(X, packed).isfinite().all()
    with pytest.raises(ValueError, match="max_length must be at least the length of every document; got 20"):
        mixer(X, whole(BATCH, LENGTH))


def test_longhorn_is_the_recurrence_of_its_release():
    mixer = made(Longhorn(width=WIDTH, expansion=1.5, state=5, step_rank=3))

    def other(x):
        gate = F.silu(mixer.gate(x))
        x = F.silu(convolved(mixer.value(x), mixer.conv.weight, mixer.conv.bias))
        low, k, q = mixer.selection(x).split([3, 5, 5], dim=-1)
        beta = torch.sigmoid(mixer.step(low))
        delta = beta / (1 + beta * k.square().sum(-1, keepdim=True))
        state, outputs = torch.zeros(BATCH, 36, 5, dtype=x.dtype), []
        for t in range(LENGTH):
            step, key = delta[:, t, :, None], k[:, t, None]
            state = (1 - step * key**2) * state + step * x[:, t, :, None] * key
            outputs.append((state * q[:, t, None]).sum(-1))
        return mixer.output(gate * (torch.stack(outputs, 1) + mixer.D * x))

    assert_is("longhorn", "plain recurrence of the authors' code", mixer, other)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RGLRU(width=WIDTH, blocks=5), "blocks"),
        (lambda: HGRN(width=WIDTH, layer=0, depth=1, expansion=0.0), "expansion"),
        (lambda: AFTFull(width=WIDTH, max_length=0), "max_length"),
        (lambda: AFTSimple(width=WIDTH, inner=0), "inner"),
        (lambda: Longhorn(width=WIDTH, state=0), "state"),
        (lambda: GatedShortConvolution(width=WIDTH, conv_size=0), "conv_size"),
    ],
)
def test_wrong_settings_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
