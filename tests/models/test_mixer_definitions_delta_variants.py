"""Variants of the delta rule against the functions of flash-linear-attention that are written to be read.

Those compute in float32 inside. What is around them, its layers' projections, convolutions, norms and gates, is written
out here, since the layers themselves call GPU kernels.
"""

import pytest
import torch
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.layers.decay_gate import DecayGate
from longreach.models.mixers.delta.comba import Comba
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.delta.gated_deltanet2 import GatedDeltaNet2
from longreach.models.mixers.delta.gated_deltaproduct import GatedDeltaProduct
from longreach.models.mixers.delta.kimi_delta_attention import KimiDeltaAttention

WIDTH, LENGTH, HEADS, KEYS, VALUES = 24, 75, 4, 6, 10
SIZES = {"width": WIDTH, "heads": HEADS, "value_dim": VALUES}
FLOAT32 = 1e-5  # of norms


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("fla", reason="flash-linear-attention is not installed; it is an oracle here and nothing else")


def filled(mixer):
    """Values that leave nothing near zero."""
    mixer = mixer.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
        if mixer.decay_gate is not None:
            mixer.decay_gate.A_log.mul_(0.3)
    return mixer


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(mixer, x):
    """Queries, keys and values: projected, convolved and activated, in one row of channels each."""
    parts = mixer.query(x), mixer.key(x), mixer.value(x)
    joined = torch.cat(parts, -1).mT
    weight = mixer.conv.weight.unsqueeze(1)
    joined = F.conv1d(F.pad(joined, (weight.shape[-1] - 1, 0)), weight, groups=len(weight))
    return F.silu(joined.mT).split([part.shape[-1] for part in parts], -1)


def heads(x, dim, times=1):
    x = x.unflatten(-1, (-1, dim))
    return x.repeat_interleave(times, 2)


def softplus_decay(mixer, x):
    gate = mixer.decay_gate
    raw = (mixer.decay(x) + gate.dt_bias).unflatten(-1, (gate.heads, -1))
    return -gate.A_log.exp()[:, None] * F.softplus(raw)


def finished(mixer, x, out, activation):
    normed = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return mixer.output((normed.flatten(-2)) * activation(mixer.gate(x)))


def compare(name, oracle, mixer, expected_of, tolerance=FLOAT32, of_elements=None):
    x, parameters = draw(2, LENGTH, WIDTH), list(mixer.parameters())
    ours = with_gradients(lambda x: mixer(x, whole(2, LENGTH)), x, parameters)
    expected = with_gradients(expected_of, x, parameters)
    assert_agrees(name, oracle, ours, expected, tolerance=tolerance, of_elements=of_elements)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet2(key_heads, negative):
    from fla.ops.gdn2.naive import naive_recurrent_gdn2

    mixer = filled(GatedDeltaNet2(**SIZES, head_dim=KEYS, key_heads=key_heads, negative_eigenvalues=negative))
    times = HEADS // key_heads

    def expected(x):
        q, k, v = convolved(mixer, x)
        erase = (1 + negative) * torch.sigmoid(mixer.erase(x))
        q, k, g, b = (heads(part, KEYS, times) for part in (q, k, softplus_decay(mixer, x).flatten(-2), erase))
        w = heads(torch.sigmoid(mixer.write(x)), VALUES)
        out, _ = naive_recurrent_gdn2(unit(q), unit(k), heads(v, VALUES), g, b, w)
        return finished(mixer, x, out, torch.sigmoid)

    oracle = (
        "flash-linear-attention, naive_recurrent_gdn2"  # in float32: where terms cancel, a few elements are off by more
    )
    compare("gated_deltanet2", oracle, mixer, expected, of_elements=4 * FLOAT32)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_comba(key_heads):
    from fla.ops.comba.naive import naive_chunk_comba

    mixer = filled(Comba(**SIZES, key_dim=KEYS, key_heads=key_heads))
    times = HEADS // key_heads

    def expected(x):
        q, k, v = convolved(mixer, x)
        q, k = unit(heads(q, KEYS)), unit(heads(k, KEYS))
        p = torch.sigmoid(mixer.feedback)[:, None] * k
        q = q - mixer.correction[:, None] * k
        q, k, p = (part.repeat_interleave(times, 2) for part in (q, k, p))
        beta, g = torch.sigmoid(mixer.beta(x)), softplus_decay(mixer, x).squeeze(-1)
        out, _ = naive_chunk_comba(q, k, heads(v, VALUES), p, g, beta)
        return finished(mixer, x, out.double(), torch.sigmoid)

    compare("comba", "flash-linear-attention, naive_chunk_comba", mixer, expected)


@pytest.mark.parametrize(("steps", "key_heads", "decay"), [(2, 4, True), (3, 2, True), (2, 2, False)])
def test_gated_deltaproduct(steps, key_heads, decay):
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    mixer = filled(GatedDeltaProduct(**SIZES, key_dim=KEYS, key_heads=key_heads, steps=steps, decay=decay))
    times = HEADS // key_heads

    def expected(x):
        q, k, v = convolved(mixer, x)
        # A step is a token of its own: rows of (steps, heads, dim).
        k, v = (part.unflatten(-1, (steps, -1)).flatten(1, 2) for part in (k, v))
        q, k = unit(heads(q, KEYS, times)), unit(heads(k, KEYS, times))
        beta = 2 * torch.sigmoid(mixer.beta(x)).unflatten(-1, (steps, HEADS)).flatten(1, 2)
        g = softplus_decay(mixer, x).squeeze(-1) if decay else None
        out, _ = naive_recurrent_gated_delta_product(q, k, heads(v, VALUES), g, beta, KEYS**-0.5, num_householder=steps)
        return finished(mixer, x, out, F.silu)

    name = "gated_deltaproduct" if decay else "deltaproduct"
    compare(name, "flash-linear-attention, naive_recurrent_gated_delta_product", mixer, expected)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_kimi_delta_attention_with_either_decay(bound):
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    mixer = filled(KimiDeltaAttention(**SIZES, head_dim=KEYS, key_heads=2, lower_bound=bound, gate_bias=True))
    gate = mixer.decay_gate

    def expected(x):
        q, k, v = convolved(mixer, x)
        raw = heads(mixer.decay(x), KEYS)
        if bound is None:
            g = naive_kda_gate(raw, gate.A_log, gate.dt_bias)
        else:
            g = naive_kda_lowerbound_gate(raw, gate.A_log, gate.dt_bias, bound)
        q, k = unit(heads(q, KEYS, 2)), unit(heads(k, KEYS, 2))
        out, _ = naive_recurrent_kda(q, k, heads(v, VALUES), g, torch.sigmoid(mixer.beta(x)))
        return finished(mixer, x, out, torch.sigmoid)

    name = "kimi_delta_attention" if bound is None else "kimi_delta_attention_bounded"
    compare(name, "flash-linear-attention, naive_recurrent_kda and its gate", mixer, expected)


def test_deltanet_has_no_output_gate():
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    mixer = filled(GatedDeltaNet(**SIZES, key_dim=KEYS, decay=False, gate=False))

    def expected(x):
        q, k, v = convolved(mixer, x)
        q, k, v = (part.transpose(1, 2) for part in (unit(heads(q, KEYS)), unit(heads(k, KEYS)), heads(v, VALUES)))
        out, _ = delta_rule_recurrence(q, k, v, torch.sigmoid(mixer.beta(x)).transpose(1, 2))
        out = out.transpose(1, 2)
        normed = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
        return mixer.output(normed.flatten(-2))

    compare("deltanet", "flash-linear-attention, delta_rule_recurrence", mixer, expected)


def test_one_step_and_equal_gates_are_the_simpler_rules():
    """DeltaProduct of one step is Gated DeltaNet; Gated DeltaNet-2 whose two gates are equal numbers is KDA."""
    one = filled(GatedDeltaProduct(**SIZES, key_dim=KEYS, steps=1, negative_eigenvalues=False))
    plain = GatedDeltaNet(**SIZES, key_dim=KEYS).double()
    plain.load_state_dict(one.state_dict())
    x, seq = draw(1, 40, WIDTH), whole(1, 40)
    torch.testing.assert_close(one(x, seq), plain(x, seq), rtol=0, atol=1e-12)

    kda = filled(KimiDeltaAttention(**SIZES, head_dim=KEYS, gate_bias=True))
    second = GatedDeltaNet2(**SIZES, head_dim=KEYS).double()
    second.load_state_dict(kda.state_dict(), strict=False)
    with torch.no_grad():
        second.erase.weight.copy_(kda.beta.weight.repeat_interleave(KEYS, 0))
        second.write.weight.copy_(kda.beta.weight.repeat_interleave(VALUES, 0))
    torch.testing.assert_close(second(x, seq), kda(x, seq), rtol=0, atol=1e-12)


def test_what_new_parameters_start_from():
    gate = DecayGate(3, 5, lower_bound=-5.0)
    mixer = Comba(**SIZES, initial_correction=0.02, key_heads=2)
    with torch.no_grad():
        for part in (gate, mixer):
            for name, parameter in part.named_parameters(recurse=False):
                assert part.initialise_parameter(name, parameter, torch.Generator().manual_seed(0))
    assert not gate.A_log.any()
    assert -5.0 <= gate(torch.full((1, 1, 15), 50.0)).min() < -4.99
    assert gate(torch.zeros(1, 1, 15)).max() < 0
    assert mixer.feedback.tolist() == [1.0, 1.0]
    assert mixer.correction.tolist() == [pytest.approx(0.02)] * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GatedDeltaProduct(**SIZES, steps=0), "steps must be at least 1; got 0"),
        (lambda: KimiDeltaAttention(**SIZES, lower_bound=0.5), "lower_bound must be negative"),
        (lambda: GatedDeltaNet2(**SIZES, key_heads=3), "key_heads must divide heads=4; got 3"),
        (lambda: Comba(width=30, heads=4), "heads must divide width=30; got 4"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
