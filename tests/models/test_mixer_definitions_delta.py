"""Mixers of the delta rule against published code, run as its plain functions where it would call kernels."""

import pytest
import torch
from definitions import definitions_of
from oracles import assert_agrees, with_gradients
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.pointwise import l2_norm
from longreach.models.layers.decay_gate import DecayGate
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.delta.kimi_delta_attention import KimiDeltaAttention
from longreach.models.mixers.delta.rwkv7 import RWKV7, rank
from longreach.parallel.sequence import Sequence

WIDTH, LENGTH = 32, 75


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(batch=2, length=LENGTH):
    return Sequence.single(Documents.whole(batch, length))


def fill(module):
    """Values that leave nothing near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)


def assert_same_with_gradients(mixer, oracle, ours, expected_of, parameters):
    """Outputs, the gradient of x and those of the parameters (our name: theirs); theirs computes in float32 inside."""
    x, dout, own = draw(2, LENGTH, WIDTH), draw(2, LENGTH, WIDTH, seed=9), dict(ours.named_parameters())
    found = []
    for call, of in ((lambda x: ours(x, whole()), own), (expected_of, parameters)):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.backward(dout)
        found.append([out.detach(), leaf.grad, *(of[name].grad.view_as(own[name]) for name in parameters)])
    assert_agrees(mixer, oracle, *(tensors[:1] for tensors in found), tolerance=1e-4)
    assert_agrees(mixer, oracle, *found, tolerance=5e-4)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_gated_deltanet_is_the_one_in_transformers_qwen3_next(key_heads):
    modeling = definitions_of("qwen3_next")
    config = modeling.Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=4, linear_num_key_heads=key_heads, linear_key_head_dim=6,
        linear_value_head_dim=10, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = modeling.Qwen3NextGatedDeltaNet(config, 0).double()
    fill(theirs)
    ours = GatedDeltaNet(width=WIDTH, heads=4, key_heads=key_heads, key_dim=6, value_dim=10).double()
    each = 4 // key_heads
    fused = theirs.in_proj_qkvz.weight.detach().unflatten(0, (key_heads, -1))
    q, k, v, z = (part.flatten(0, 1) for part in fused.split([6, 6, 10 * each, 10 * each], dim=1))
    b, a = theirs.in_proj_ba.weight.detach().unflatten(0, (key_heads, 2, each)).unbind(1)
    ours.load_state_dict(
        {
            "query.weight": q, "key.weight": k, "value.weight": v, "gate.weight": z,
            "beta.weight": b.flatten(0, 1), "decay.weight": a.flatten(0, 1),
            "conv.weight": theirs.conv1d.weight.detach().squeeze(1),
            "decay_gate.A_log": theirs.A_log.detach(), "decay_gate.dt_bias": theirs.dt_bias.detach(),
            "norm.weight": theirs.norm.weight.detach(), "output.weight": theirs.out_proj.weight.detach(),
        }
    )  # fmt: skip
    parameters = {
        "conv.weight": theirs.conv1d.weight, "decay_gate.A_log": theirs.A_log, "decay_gate.dt_bias": theirs.dt_bias,
        "norm.weight": theirs.norm.weight, "output.weight": theirs.out_proj.weight,
    }  # fmt: skip
    name = "transformers, Qwen3NextGatedDeltaNet"
    assert_same_with_gradients("gated_deltanet", name, ours, theirs, parameters)


def test_bounded_kimi_delta_attention_of_full_rank_is_ling_3s_in_transformers():
    modeling = definitions_of("bailing_hybrid")
    config = modeling.BailingHybridConfig(
        hidden_size=WIDTH, num_attention_heads=4, head_dim=6, short_conv_kernel_size=4, num_hidden_layers=1,
        layer_types=["linear_attention"], mlp_layer_types=["dense"],
    )  # fmt: skip
    theirs = modeling.BailingHybridDeltaAttention(config, 0).double()
    fill(theirs)
    with torch.no_grad():
        theirs.forget_gate.A_log.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    sizes = {"width": WIDTH, "heads": 4, "head_dim": 6, "norm_eps": config.rms_norm_eps}
    ours = KimiDeltaAttention(**sizes, lower_bound=-5.0, low_rank=False).double()
    names = {
        "query": theirs.q_proj, "key": theirs.k_proj, "value": theirs.v_proj, "beta": theirs.b_proj,
        "decay": theirs.forget_gate.f_proj, "gate": theirs.g_proj, "norm": theirs.o_norm, "output": theirs.o_proj,
        "conv": theirs.conv1d,
    }  # fmt: skip
    parameters = {f"{name}.weight": layer.weight for name, layer in names.items()}
    parameters |= {"decay_gate.A_log": theirs.forget_gate.A_log, "decay_gate.dt_bias": theirs.forget_gate.dt_bias}
    shapes = {name: x.shape for name, x in ours.named_parameters()}
    ours.load_state_dict({name: x.detach().reshape(shapes[name]) for name, x in parameters.items()})
    name = "transformers, BailingHybridDeltaAttention"
    assert_same_with_gradients("kimi_delta_attention_bounded", name, ours, theirs, parameters)


def test_kimi_delta_attention_is_the_one_in_transformers():
    modeling = definitions_of("kimi_linear")
    config = modeling.KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=4, linear_head_dim=6, linear_conv_kernel_dim=4, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = modeling.KimiLinearDeltaAttention(config, 0).double()
    fill(theirs)
    with torch.no_grad():
        theirs.forget_gate.A_log.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    ours = KimiDeltaAttention(width=WIDTH, heads=4, head_dim=6, norm_eps=config.rms_norm_eps).double()
    names = {
        "query": theirs.q_proj, "key": theirs.k_proj, "value": theirs.v_proj, "beta": theirs.b_proj,
        "decay.down": theirs.forget_gate.f_a_proj, "decay.up": theirs.forget_gate.f_b_proj,
        "gate.down": theirs.g_a_proj, "gate.up": theirs.g_b_proj, "norm": theirs.o_norm, "output": theirs.o_proj,
        "conv": theirs.conv1d,
    }  # fmt: skip
    parameters = {f"{name}.weight": layer.weight for name, layer in names.items()}
    parameters |= {"decay_gate.A_log": theirs.forget_gate.A_log, "decay_gate.dt_bias": theirs.forget_gate.dt_bias}
    shapes = {name: x.shape for name, x in ours.named_parameters()}
    ours.load_state_dict({name: x.detach().reshape(shapes[name]) for name, x in parameters.items()})
    name = "transformers, KimiLinearDeltaAttention"
    assert_same_with_gradients("kimi_delta_attention", name, ours, theirs, parameters)


@pytest.mark.slow  # flash-linear-attention takes seconds to import
@pytest.mark.parametrize("layer", [0, 1])
def test_rwkv7_is_the_one_in_flash_linear_attention(monkeypatch, layer):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed; it is an oracle here and nothing else")
    from fla.layers import rwkv7 as modeling
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def recurrence(*, r, w, k, v, a, b, scale, **_):
        ahead = (x.transpose(1, 2).float() for x in (r * r.shape[-1] ** 0.5 * scale, k, v, a, b, w))
        return dplr_recurrence(*ahead)[0].transpose(1, 2).double(), None

    monkeypatch.setattr(modeling, "chunk_rwkv7", recurrence)
    monkeypatch.setattr(modeling, "token_shift", lambda x, *_, **__: (token_shift_ref(x), None))
    monkeypatch.setattr(modeling, "fused_addcmul_rwkv7", torch_addcmul_rwkv7)
    monkeypatch.setattr(modeling, "fused_k_rwkv7", k_update_ref)
    monkeypatch.setattr(modeling, "gate_output_correction", gate_output_correction_ref)
    theirs = modeling.RWKV7Attention(
        hidden_size=WIDTH, head_dim=8, layer_idx=layer, num_hidden_layers=4, decay_low_rank_dim=4, a_low_rank_dim=5,
        v_low_rank_dim=6, gate_low_rank_dim=7,
    ).double()  # fmt: skip
    ours = RWKV7(
        width=WIDTH, layer=layer, depth=4, occurrence=layer, head_dim=8, decay_rank=4, rate_rank=5, value_rank=6,
        gate_rank=7,
    ).double()  # fmt: skip
    published = {name: x.detach().clone() for name, x in theirs.named_parameters()}
    fill(theirs)
    names = {
        "receptance.weight": "r_proj.weight", "key.weight": "k_proj.weight", "value.weight": "v_proj.weight",
        "output.weight": "o_proj.weight", "norm.weight": "g_norm.weight", "norm.bias": "g_norm.bias",
        "removal_key": "k_k", "replacement_key": "k_a", "bonus": "r_k",
    }  # fmt: skip
    maps = {"decay": "w_lora", "rate": "a_lora", "gate": "g_lora"} | ({"value_mix": "v_lora"} if layer else {})
    for name, other in maps.items():
        names |= {f"{name}.down.weight": f"{other}.lora.0.weight", f"{name}.up.weight": f"{other}.lora.2.weight"}
        names |= {f"{name}.up.bias": f"{other}.lora.2.bias"} if name != "gate" else {}
    parameters = {name: theirs.get_parameter(other) for name, other in names.items()}
    mixes = [theirs.get_parameter(f"x_{c}") for c in "rwkvag"]
    state = {name: x.detach() for name, x in parameters.items()}
    ours.load_state_dict({**state, "mix": torch.cat([m.detach().flatten(0, 1) for m in mixes])})

    first = draw(2, LENGTH, WIDTH, seed=5)
    values = []

    def expected_of(x):
        out, *_, value = theirs(x, v_first=first if layer else None)
        values.append(value)
        return out

    def run(x, seq):
        result = ours(x, seq, *([first] if layer else []))
        if layer:
            return result
        values.append(result[1])
        return result[0]

    run.named_parameters = ours.named_parameters
    name = "flash-linear-attention, RWKV7Attention"
    assert_same_with_gradients("rwkv7", name, run, expected_of, parameters)
    if not layer:
        torch.testing.assert_close(*values)
    torch.testing.assert_close(ours.mix.grad, torch.cat([m.grad.flatten(0, 1) for m in mixes]), atol=2e-4, rtol=2e-4)
    own = dict(ours.named_parameters())
    for name, other in names.items():  # what the authors start from
        value = torch.empty(own[name].shape)
        if ours.initialise_parameter(name, value, torch.Generator()):
            right = published[other].view_as(own[name])
            if name.endswith(".weight") and value.dim() == 2:  # drawn in another way, of the same size
                value, right = value.square().mean().sqrt(), right.square().mean().sqrt()
            torch.testing.assert_close(value.double(), right, atol=1e-5, rtol=0.1 if value.dim() == 0 else 1e-5)


def test_deltanet_and_negative_eigenvalues():
    plain = GatedDeltaNet(width=WIDTH, heads=4, conv_size=None, decay=False).double()
    doubled = GatedDeltaNet(width=WIDTH, heads=4, conv_size=None, decay=False, negative_eigenvalues=True).double()
    fill(plain)
    doubled.load_state_dict(plain.state_dict())
    x = draw(2, LENGTH, WIDTH)
    for mixer, factor in ((plain, 1.0), (doubled, 2.0)):

        def definition(x, mixer=mixer, factor=factor):
            q, k, v = (F.silu(part(x)).unflatten(-1, (4, 8)) for part in (mixer.query, mixer.key, mixer.value))
            q, k = l2_norm(q) * 8**-0.5, l2_norm(k)
            beta = factor * torch.sigmoid(mixer.beta(x))
            state, outs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
            for t in range(LENGTH):
                held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
                state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
                outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
            return mixer.output(F.silu(mixer.gate(x)) * mixer.norm(torch.stack(outs, 1)).flatten(-2))

        parameters = list(mixer.parameters())
        actual = with_gradients(lambda x, mixer=mixer: mixer(x, whole()), x, parameters)
        expected = with_gradients(definition, x, parameters)
        assert_agrees("deltanet", "plain recurrence of the paper", actual, expected)


def test_decay_gates_start_within_their_ranges():
    gate = DecayGate(64, 5, rates=(1.0, 16.0))
    for name, parameter in gate.named_parameters():
        with torch.no_grad():
            assert gate.initialise_parameter(name, parameter, torch.Generator().manual_seed(0))
    assert 1.0 <= gate.A_log.exp().min() < 3.0
    assert 14.0 < gate.A_log.exp().max() <= 16.0
    steps = F.softplus(gate.dt_bias)
    assert 0.99e-3 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.101
    out = gate(torch.zeros(1, 2, 320, dtype=torch.bfloat16))
    assert (out.shape, out.dtype) == ((1, 2, 64, 5), torch.float32)
    assert out.max() <= 0


def test_l2_norm_of_nothing_is_nothing():
    x = torch.zeros(3, requires_grad=True)
    l2_norm(x).sum().backward()
    assert not l2_norm(x).any()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(l2_norm(torch.tensor([3.0, 4.0]), eps=0.0), torch.tensor([0.6, 0.8]))


def test_ranks_are_the_papers():
    assert [rank(768, factor) for factor in (2.5, 1.7, 5.0)] == [64, 32, 128]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GatedDeltaNet(width=32, heads=5), "heads must divide width=32; got 5"),
        (lambda: GatedDeltaNet(width=32, heads=4, key_heads=3), "key_heads must divide heads=4; got 3"),
        (lambda: KimiDeltaAttention(width=32, heads=5), "heads must divide width=32; got 5"),
        (lambda: KimiDeltaAttention(width=32, heads=4, gate_rank=0), "gate_rank must be at least 1; got 0"),
        (
            lambda: KimiDeltaAttention(width=32, heads=4, gate_rank=2, low_rank=False),
            "gate_rank must be null with low_",
        ),
        (lambda: RWKV7(width=32, layer=0, depth=2), "head_dim must divide width=32; got 64"),
        (
            lambda: RWKV7(width=32, layer=0, depth=2, head_dim=8, key_eps=-1.0),
            "head_norm_eps must be positive, and key",
        ),
        (lambda: GatedDeltaNet(width=32, heads=4, gate_activation="relu"), "gate_activation must be one of silu, sig"),
        (lambda: GatedDeltaNet(width=32, heads=4, gate=False, gate_activation="silu"), "gate_activation must be null"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
