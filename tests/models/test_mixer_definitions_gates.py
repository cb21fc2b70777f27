"""Linear mixers whose gates depend on the token, against flash-linear-attention or the papers, with every gradient."""

import pytest
import torch
from model_presets import randomise, small_hybrid
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.mixers.linear.abc import ABC
from longreach.models.mixers.linear.decaying_fast_weights import DecayingFastWeights
from longreach.models.mixers.linear.gated_retention import GatedRetention
from longreach.models.mixers.linear.gated_slot_attention import GatedSlotAttention
from longreach.models.mixers.linear.gateloop import GateLoop
from longreach.models.mixers.linear.hgrn2 import HGRN2
from longreach.parallel.sequence import Sequence

WIDTH, BATCH, LENGTH = 24, 2, 37
X = draw(BATCH, LENGTH, WIDTH)
PAPER = "plain recurrence of the paper"


def assert_is(name, oracle, mixer, other, *, tolerance=1e-9):
    """The mixer is `other(x)`, which uses the mixer's own parameters; those that get no gradient are left out."""
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def ours(x):
        out = mixer(x, whole(BATCH, LENGTH))
        return out[0] if mixer.publishes else out

    actual, expected = with_gradients(ours, X, parameters), with_gradients(other, X, parameters)
    assert_agrees(name, oracle, actual, expected, tolerance=tolerance)


def made(mixer):
    mixer = mixer.double()
    randomise(mixer)
    return mixer


def naive(path, function):
    """A naive function of flash-linear-attention. They compute in float32."""
    return getattr(pytest.importorskip(path, reason="needs flash-linear-attention"), function)


def by_head(x, heads):
    return x.unflatten(-1, (heads, -1))


def rms(x, mixer):
    return F.rms_norm(x, x.shape[-1:], mixer.norm.weight, mixer.norm.eps)


# HGRN2


@pytest.mark.parametrize("layer", [0, 2])
def test_hgrn2_is_the_layer_of_flash_linear_attention(layer):
    recurrent = naive("fla.ops.gla.naive", "naive_recurrent_gla")
    mixer = made(HGRN2(width=WIDTH, layer=layer, depth=4, heads=3, key_dim=5))

    def other(x):
        shares = mixer.bounds.weight.softmax(0)
        bound = (shares.cumsum(0) - shares[0])[layer]
        forget = bound + (1 - bound) * torch.sigmoid(mixer.forget(x))
        parts = F.silu(mixer.query(x)), 1 - forget, mixer.value(x), forget.log()
        out = recurrent(*(by_head(part, 3) for part in parts))[0]
        return mixer.output(rms(out.flatten(-2), mixer))

    if layer == 0:  # bound by 0, whatever the parameters
        mixer.bounds.weight.requires_grad_(False)
    assert_is("hgrn2", "flash-linear-attention, naive_recurrent_gla", mixer, other, tolerance=1e-6)


def test_hgrn2_is_the_recurrence_of_the_paper():
    mixer = made(HGRN2(width=WIDTH, layer=3, depth=4, heads=3, key_dim=5))

    def other(x):
        bound = mixer.bounds.weight.softmax(0)[1:4].sum(0)
        forget = by_head(bound + (1 - bound) * torch.sigmoid(mixer.forget(x)), 3)
        q, v = by_head(F.silu(mixer.query(x)), 3), by_head(mixer.value(x), 3)
        state, outputs = x.new_zeros(BATCH, 3, 5, 8), []
        for t in range(LENGTH):
            state = forget[:, t, ..., None] * state + (1 - forget)[:, t, ..., None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 5**-0.5, state))
        return mixer.output(rms(torch.stack(outputs, 1).flatten(-2), mixer))

    assert_is("hgrn2", PAPER, mixer, other)


def test_hgrn2_shares_bounds_that_rise_with_depth():
    model = small_hybrid("hgrn2")
    first, second = model.mixers[0], model.mixers[2]
    assert second.bounds is None
    torch.nn.init.zeros_(first.bounds.weight)
    torch.testing.assert_close(first.bounds()[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64))
    tokens = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    model(tokens, whole(1, 9), tokens)[0].backward()
    assert (first.bounds.weight.grad.abs().amax(1) > 0).all()  # through the second


# Slots


def slots_of_tokens(q, k, v, entering, forget):
    """Softmax over slots, one token at a time: shapes as of `slot_attention`, forget not a logarithm; no scale."""
    (batch, length, heads, dim), slots = q.shape, entering.shape[-1]
    keys, values, outputs = q.new_zeros(batch, heads, slots, dim), q.new_zeros(batch, heads, slots, v.shape[-1]), []
    for t in range(length):
        keys = forget[:, t, ..., None] * keys + entering[:, t, ..., None] * k[:, t, :, None]
        values = forget[:, t, ..., None] * values + entering[:, t, ..., None] * v[:, t, :, None]
        weights = torch.einsum("bhk,bhmk->bhm", q[:, t], keys).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", weights, values))
    return torch.stack(outputs, 1)


def gsa(mixer, attend):
    def other(x):
        q = by_head(F.silu(mixer.query(x)), 4)
        parts = F.silu(mixer.key(x)), F.silu(mixer.value(x)), torch.sigmoid(mixer.forget(x)) ** (1 / 8)
        k, v, forget = (by_head(part, 2).repeat_interleave(2, dim=2) for part in parts)
        out = F.silu(attend(q, k, v, 1 - forget, forget).flatten(-2))
        return mixer.output(rms(out, mixer))

    return other


def test_gated_slot_attention_is_that_of_flash_linear_attention(monkeypatch):
    recurrent = naive("fla.ops.gsa.naive", "naive_recurrent_gsa")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # its rounding in float32 differs between CPUs
    mixer = made(GatedSlotAttention(width=WIDTH, heads=4, kv_heads=2, key_dim=5, value_dim=7, slots=3))

    def attend(q, k, v, entering, forget):
        return recurrent(q, k, v, entering, forget.log(), scale=1.0)[0]

    oracle = "flash-linear-attention, naive_recurrent_gsa"
    assert_is("gated_slot_attention", oracle, mixer, gsa(mixer, attend))


def test_gated_slot_attention_is_the_recurrence_of_the_paper():
    mixer = made(GatedSlotAttention(width=WIDTH, heads=4, kv_heads=2, key_dim=5, value_dim=7, slots=3))
    assert_is("gated_slot_attention", PAPER, mixer, gsa(mixer, slots_of_tokens))


def averaged(q, k, v, s):
    """ABC as the paper writes it: slots are averages of keys and values, weighed by exp(s); no scale."""
    weights = s.exp()
    total = weights.cumsum(1).unsqueeze(-1)
    keys = (weights.unsqueeze(-1) * k.unsqueeze(-2)).cumsum(1) / total
    values = (weights.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1) / total
    return torch.einsum("bthm,bthmv->bthv", torch.einsum("bthk,bthmk->bthm", q, keys).softmax(-1), values)


def abc(mixer, attend):
    def other(x):
        parts = mixer.query(x), mixer.key(x), mixer.value(x), mixer.slot(x).clamp(-mixer.cap, mixer.cap)
        q, k, v, s = (by_head(part, 4) for part in parts)
        if mixer.rotary is not None:
            q, k = (mixer.rotary(part, whole(BATCH, LENGTH)) for part in (q, k))
        out = rms(attend(q, k, v, s), mixer) * F.silu(by_head(mixer.gate(x), 4))
        return mixer.output(out.flatten(-2))

    return other


def test_abc_is_that_of_flash_linear_attention():
    recurrent = naive("fla.ops.abc.naive", "naive_recurrent_abc")
    mixer = made(ABC(width=WIDTH, heads=4, key_dim=6, value_dim=7, slots=3))

    def attend(q, k, v, s):
        return recurrent(*(part.transpose(1, 2) for part in (q, k, v, s)))[0].transpose(1, 2)

    oracle = "flash-linear-attention, naive_recurrent_abc"
    assert_is("abc", oracle, mixer, abc(mixer, attend), tolerance=1e-6)


@pytest.mark.parametrize("spread", [1, 6])
def test_abc_is_the_attention_of_the_paper(spread):
    """With slots whose weights lie up to exp(40) apart, too."""
    mixer = made(ABC(width=WIDTH, heads=4, key_dim=5, value_dim=7, slots=3, rope_base=None))
    with torch.no_grad():
        mixer.slot.weight.mul_(spread)

    def attend(q, k, v, s):
        return averaged(q * 5**-0.5, k, v, s)

    assert_is("abc", PAPER, mixer, abc(mixer, attend))


def test_abc_is_finite_where_one_token_outweighs_all():
    mixer = made(ABC(width=WIDTH, heads=4, key_dim=6)).float()
    with torch.no_grad():
        mixer.slot.weight.mul_(1e3)
    packed = Sequence.single(Documents.from_lengths([[1, 20, 16], [37]], LENGTH))
    for tensor in with_gradients(lambda x: mixer(x, packed), X.float(), mixer.parameters()):
        assert tensor.isfinite().all()


# Decays per head, per channel and on both sides


def test_gated_retention_is_that_of_yoco():
    recurrent = naive("fla.ops.simple_gla.naive", "naive_recurrent_simple_gla")
    mixer = made(GatedRetention(width=WIDTH, heads=3))

    def turned(x):
        """Neighbouring channels as complex numbers, as in the authors' code; ours lie half a head apart."""
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
        pairs = torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), dim=-1))
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        return torch.view_as_real(pairs * turn).flatten(-2)

    def other(x):
        q, k, v = (by_head(part(x), 3) for part in (mixer.query, mixer.key, mixer.value))
        out = recurrent(turned(q), turned(k), v, F.logsigmoid(mixer.decay(x)) / 16)[0]
        return mixer.output(F.rms_norm(out, (8,), eps=1e-6).flatten(-2) * F.silu(mixer.gate(x)))

    oracle = "flash-linear-attention, naive_recurrent_simple_gla"
    assert_is("gated_retention", oracle, mixer, other, tolerance=1e-6)  # our frequencies are float32, too


def test_decaying_fast_weights_are_the_recurrence_of_the_paper():
    mixer = made(DecayingFastWeights(width=WIDTH, heads=3, key_dim=5, value_dim=7))

    def other(x):
        q, k, v = (by_head(part(x), 3) for part in (mixer.query, mixer.key, mixer.value))
        z, f = (by_head(part(x).sigmoid(), 3) for part in (mixer.key_forget, mixer.value_forget))
        state, outputs = x.new_zeros(BATCH, 3, 5, 7), []
        for t in range(LENGTH):
            state = z[:, t, ..., None] * f[:, t, :, None] * state + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 5**-0.5, state))
        return mixer.output(torch.stack(outputs, 1).flatten(-2))

    assert_is("decaying_fast_weights", PAPER, mixer, other)


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize(("name", "heads"), [("gateloop", None), ("gateloop_heads", 4)])
def test_gateloop_is_the_complex_recurrence_of_the_paper(name, heads, rotation):
    mixer = made(GateLoop(width=WIDTH, heads=heads, rotation=rotation))
    heads = heads or WIDTH

    def other(x):
        q, k, v = (by_head(part(x), heads) for part in (mixer.query, mixer.key, mixer.value))
        phase = mixer.phase(x) if rotation else torch.zeros_like(x)
        transition = by_head(torch.polar(mixer.decay(x).sigmoid(), phase), heads)
        state, outputs = x.new_zeros(BATCH, heads, k.shape[-1], k.shape[-1], dtype=torch.complex128), []
        for t in range(LENGTH):
            state = transition[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.real))
        return mixer.output(torch.stack(outputs, 1).flatten(-2) * F.silu(mixer.gate(x)))

    assert_is(name, PAPER, mixer, other)


@pytest.mark.parametrize("build", [GateLoop, lambda **sizes: DecayingFastWeights(heads=2, **sizes)])
def test_gates_start_open(build):
    mixer = build(width=WIDTH)
    names = [name for name, _ in mixer.named_parameters() if name.endswith("bias") and "phase" not in name]
    for name in names:
        value = torch.empty(mixer.get_parameter(name).shape)
        assert mixer.initialise_parameter(name, value, torch.Generator())
        assert 0.95 < value.sigmoid().min() < value.sigmoid().max() < 0.998
    assert names


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HGRN2(width=32, layer=0, depth=1, heads=5), "heads must divide width=32; got 5"),
        (lambda: GatedSlotAttention(width=32, heads=4, kv_heads=3), "kv_heads must divide heads=4; got 3"),
        (lambda: GatedSlotAttention(width=32, heads=4, slots=0), "slots and gate_normaliser must be positive; got 0"),
        (lambda: ABC(width=32, heads=4, slots=0), "slots must be at least 1; got 0"),
        (lambda: ABC(width=32, heads=4, cap=400.0), "cap must be above 0 and at most 100; got 400.0"),
        (lambda: GatedRetention(width=32, heads=16), "head_dim must be at least 4 and rope_base positive; got 2"),
        (lambda: GatedRetention(width=32, heads=4, gate_normaliser=0), "gate_normaliser must be positive; got 0"),
        (lambda: DecayingFastWeights(width=32, heads=3), "heads must divide width=32; got 3"),
        (lambda: GateLoop(width=32, heads=3), "heads must divide width=32; got 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
