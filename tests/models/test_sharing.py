"""Layers that share their weights: against the same model with weights of each layer's own and merged adapters."""

from functools import partial

import pytest
import torch
from model_presets import build_model, feed_forward, in_pieces, mixer_partial, small_hybrid, tokens, total_loss

from longreach.kernels.documents import Documents
from longreach.models.block import SandwichBlock
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.parallel.sequence import Sequence

LENGTH, RANK = 40, 3
PACKED = Documents.from_lengths([[9, 22, 6], [LENGTH]], LENGTH)
SHARED = {"softmax": ["query", "output"], "feed_forward": ["gate+up", "down"]}
MIXERS = {"softmax": mixer_partial("softmax_attention"), "lightning": mixer_partial("lightning_attention")}


def model_with(shared, **changes):
    settings = {"pattern": ["softmax*2", "lightning"], "depth": 6, "mixers": MIXERS, "block": SandwichBlock, **changes}
    rank = RANK if any((shared or {}).values()) else None
    return small_hybrid("softmax_attention", shared=shared, adapter_rank=rank, **settings)


def adapters_of(state, path):
    """A and B by which a weight of this path differs from layer to layer, or None."""
    name = path.removesuffix("weight") + "adapter."
    return (state[f"{name}down.weight"], state[f"{name}up.weight"]) if f"{name}up.weight" in state else None


def test_gradients_are_the_sums_over_all_layers_that_share():
    ours, apart = model_with(SHARED), model_with(None)
    state, merged = ours.state_dict(keep_vars=True), {}
    for path in apart.state_dict():
        adapters = adapters_of(state, path)
        merged[path] = state[path].detach() + (adapters[1] @ adapters[0] if adapters else 0)
    apart.load_state_dict(merged)

    inputs, seq = tokens(2, LENGTH), Sequence.single(PACKED)
    losses = [model(inputs, seq, inputs.roll(-1, 1))[0] for model in (ours, apart)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    sum(losses).backward()
    expected = {id(parameter): torch.zeros_like(parameter) for parameter in ours.parameters()}
    for path, parameter in apart.named_parameters():
        expected[id(state[path])] += parameter.grad
        if adapters := adapters_of(state, path):
            expected[id(adapters[0])] += adapters[1].T @ parameter.grad
            expected[id(adapters[1])] += parameter.grad @ adapters[0].T
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[id(parameter)], rtol=1e-9, atol=1e-9, msg=name)


def test_weights_and_norms_are_shared_and_adapters_are_not():
    model, apart = model_with(SHARED), model_with(None)
    first, second, other = (model.blocks[layer] for layer in (0, 1, 2))
    for name in ("mixer.key.weight", "mixer_norm.weight", "mixer_output_norm.weight", "feed_forward.up.weight"):
        assert first.get_parameter(name) is second.get_parameter(name), name
    assert other.feed_forward_norm.weight is first.feed_forward_norm.weight
    assert other.mixer_norm.weight is not first.mixer_norm.weight
    assert first.mixer.query.adapter.up.weight is not second.mixer.query.adapter.up.weight
    assert first.feed_forward.gate.adapter.down.weight is first.feed_forward.up.adapter.down.weight
    width, hidden = model.width, first.feed_forward.up.out_features
    inner = first.mixer.query.out_features
    attention, mlp = width * (2 * inner + 2 * first.mixer.key.out_features), 3 * width * hidden
    saved = 3 * (attention + 2 * width) + 5 * (mlp + 2 * width)
    adapters = 4 * 2 * RANK * (width + inner) + 6 * RANK * (2 * width + 3 * hidden)
    assert apart.parameter_count() - model.parameter_count() == saved - adapters
    assert model.flops(PACKED) - apart.flops(PACKED) == 2 * 2 * LENGTH * (adapters + 6 * RANK * width)


def test_every_use_decodes_with_a_cache_of_its_own():
    model = model_with(SHARED)
    x = tokens(1, 20)
    whole = model.hidden(x, Sequence.single(Documents.from_lengths([[20]], 20)))
    torch.testing.assert_close(in_pieces(model.hidden, x, [7, 1, 12]), whole, rtol=1e-9, atol=1e-9)


def test_what_only_later_layers_have_is_shared_from_the_first_of_them_on():
    model = small_hybrid("rwkv7", pattern=["rwkv7"], mixers={"rwkv7": mixer_partial("rwkv7")}, shared={"rwkv7": []})
    first, second, third = (dict(model.blocks[layer].mixer.named_parameters()) for layer in (0, 1, 2))
    assert set(second) > set(first)
    assert all(second[name] is third[name] for name in second)
    assert all(second[name] is first[name] for name in first)


def test_shared_experts_count_once_and_each_layer_balances_by_its_own_load():
    experts = partial(MixtureOfExperts, experts=4, experts_per_token=1, hidden=8, bias_rate=0.1, renormalise=False)
    model = small_hybrid("softmax_attention", feed_forward=experts, shared={"feed_forward": []})
    first, second = (model.blocks[layer].feed_forward for layer in (0, 1))
    assert first.experts.up.weight is second.experts.up.weight
    assert first.router.bias is not second.router.bias
    weights = sum(weight.numel() for weight in first.experts.parameters())
    assert model.parameter_count() - model.parameter_count(active=True) == weights * 3 // 4
    total_loss(model, tokens(1, 8), Sequence.single(Documents.from_lengths([[8]], 8)), tokens(1, 8))[0].backward()
    assert first.experts.up.weight.grad is not None


@pytest.mark.parametrize(
    ("shared", "changes", "message"),
    [
        ({"gla": []}, {}, r"model.shared must have names .* \(softmax, lightning, feed_forward\); got gla"),
        ({"softmax": ["keys"]}, {}, r"linear layers of SoftmaxAttention \(query, key, value, output\).*got 'keys'"),
        ({"softmax": ["query", "key+query"]}, {}, "each once.* got 'query'"),
        (
            {"feed_forward": ["up+down"]},
            {},
            r"shared.feed_forward: up\+down: layers must read one width; got 32 and 48",
        ),
        ({"softmax": ["query"]}, {"adapter_rank": None}, "model.adapter_rank must be set .* got None"),
        ({"softmax": []}, {"adapter_rank": 4}, "model.adapter_rank must be set .* got 4"),
        ({"softmax": ["query"]}, {"adapter_rank": 0}, "model.adapter_rank must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(shared, changes, message):
    changes = {"adapter_rank": RANK if any(shared.values()) else None, "depth": 6, **changes}
    settings = {"pattern": ["softmax*2", "lightning"], "mixers": MIXERS, "feed_forward": feed_forward(), **changes}
    with pytest.raises(ValueError, match=message):
        small_hybrid("softmax_attention", shared=shared, **settings)


def test_the_embedding_is_read_in_blocks_that_give_it():
    with pytest.raises(ValueError, match=r"attention_a.with_embedding must come with a block that gives .* got Block"):
        build_model("zamba2_tiny", block=None)
    with pytest.raises(ValueError, match="with_embedding must be false for ForgettingAttention; got true"):
        mixer_partial("forgetting_attention", with_embedding=True)(width=32)
