"""Attention to another layer's keys and gates on another layer's memory, against transformers and plain layers."""

from functools import partial

import pytest
import torch
from definitions import definitions_of
from model_presets import WIDTH, feed_forward, randomise, tokens
from oracles import assert_agrees, draw

from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import construct
from longreach.models.mixers.elementwise.gated_memory_unit import GatedMemoryUnit
from longreach.models.mixers.softmax.cross_attention import CrossAttention
from longreach.models.mixers.softmax.key_values import KeyValues
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.parallel.sequence import Sequence

LENGTH, WINDOW = 37, 7


def gemma():
    """Two attention layers of transformers, of which the second reads the first one's keys; without norms of values."""
    transformers = definitions_of("gemma3n")
    config = transformers.Gemma3nTextConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
        layer_types=["full_attention"] * 2, num_kv_shared_layers=1, rms_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    layers = [transformers.Gemma3nTextAttention(config, layer).double() for layer in range(2)]
    layers[0].v_norm = torch.nn.Identity()
    for layer in layers:
        layer.q_norm = torch.nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)  # theirs is of float32
        if hasattr(layer, "k_norm"):
            layer.k_norm = torch.nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
        randomise(layer)
    return transformers, layers


def test_cross_layer_attention_is_that_of_transformers():
    """Outputs of both layers, and the gradients of both inputs and of all parameters: the keys' from both readers."""
    transformers, theirs = gemma()
    mixer = partial(SoftmaxAttention, heads=4, kv_heads=2, qk_norm="head", share=2)
    ours = [construct(mixer, "it", width=WIDTH, name="it", occurrence=number).double() for number in range(2)]
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "q_norm": "query_norm",
             "k_norm": "key_norm"}  # fmt: skip
    pairs = []
    for mine, other in zip(ours, theirs, strict=True):
        for name, parameter in other.named_parameters():
            module, _, leaf = name.partition(".")
            value = mine.get_parameter(f"{names[module]}.{leaf}")
            value.data = parameter.data * (8**0.5 if module == "q_norm" else 1)  # theirs scales logits by 1
            pairs.append((value, parameter, 8**0.5 if module == "q_norm" else 1))
        assert len(list(mine.parameters())) == len(list(other.parameters()))
    length = 21
    inputs = [draw(2, length, WIDTH, seed=seed).requires_grad_() for seed in (1, 2)]
    seq = Sequence.single(Documents.whole(2, length))
    first, *keys = ours[0](inputs[0], seq)
    outs = [first, ours[1](inputs[1], seq, *keys)]

    position = tuple(part.repeat(1, 2)[None] for part in turns(length, 8))
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    shared = transformers.KVSharingDict()
    expected = [layer(x, position, mask, shared_kv_states=shared)[0] for layer, x in zip(theirs, inputs, strict=True)]
    douts = [draw(2, length, WIDTH, seed=seed) for seed in (3, 4)]
    gradients = torch.autograd.grad(outs, [*inputs, *(mine for mine, _, _ in pairs)], douts)
    of_theirs = torch.autograd.grad(expected, [*inputs, *(other for _, other, _ in pairs)], douts)
    factors = [1, 1, *(factor for _, _, factor in pairs)]
    assert_agrees(
        "cross_layer_attention",
        "transformers, Gemma3nTextAttention",
        [*outs, *(g * factor for g, factor in zip(gradients, factors, strict=True))],
        [*expected, *of_theirs],
    )


def turns(length, dims):
    """(cos, sin) of the angles `[length, dims / 2]`, whose frequencies are float32 as those of the op are."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dims, 2).float() / dims)
    angles = torch.outer(torch.arange(length).double(), frequencies.double())
    return angles.cos(), angles.sin()


def rotated(x):
    """x `[B, T, H, K]` turned by position, channels half a head apart paired."""
    cos, sin = (part[:, None] for part in turns(x.shape[1], x.shape[-1]))
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def dense_attention(q, k, v, back):
    """Of q `[B, T, H, K]` to the last `back` keys, k and v `[B, T, G, K]`."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    apart = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    scores = scores.masked_fill((apart < 0) | (apart >= back), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(2)


def decoder_decoder(model, inputs):
    """Hidden states of YOCO as its paper has them, from the parameters of `model`."""

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def heads(x):
        return x.unflatten(-1, (-1, 8))

    def mlp(x, block):
        own, x = block.mixer_2, norm(x, block.mixer_2_norm.weight)
        return own.down(torch.nn.functional.silu(own.gate(x)) * own.up(x))

    x = model.embedding(inputs)
    for block in model.blocks[:2]:
        own, normed = block.mixer_1, norm(x, block.mixer_1_norm.weight)
        q, k, v = (heads(project(normed)) for project in (own.query, own.key, own.value))
        x = x + own.output(dense_attention(rotated(q), rotated(k), v, WINDOW))
        x = x + mlp(x, block)
    made, normed = model.blocks[1].mixer_3, norm(x, model.blocks[1].mixer_3_norm.weight)
    k, v = rotated(heads(made.key(normed))), heads(made.value(normed))
    for block in model.blocks[2:]:
        own = block.mixer_1
        q = rotated(heads(own.query(norm(x, block.mixer_1_norm.weight))))
        x = x + own.output(dense_attention(q, k, v, LENGTH))
        x = x + mlp(x, block)
    return norm(x, model.norm.weight)


def test_a_decoder_decoder_is_that_of_the_paper():
    """Hidden states and all gradients, those of the keys from every layer that reads them."""
    attention, mlp = partial(SoftmaxAttention, heads=4), feed_forward()
    mixers = {
        "window": partial(attention, kv_heads=1, window=WINDOW),
        "mlp": mlp,
        "keys": partial(KeyValues, kv_heads=2, head_dim=8),
        "cross": partial(attention, keys_of="keys"),
    }
    pattern = ["window|mlp", "window|mlp|keys", "cross|mlp*2"]
    model = LanguageModel(vocabulary=61, width=WIDTH, depth=4, pattern=pattern, mixers=mixers).double()
    randomise(model)
    inputs = tokens(2, LENGTH)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]
    found = []
    for hidden in (model.hidden(inputs, Sequence.single(Documents.whole(2, LENGTH))), decoder_decoder(model, inputs)):
        found.append([hidden, *torch.autograd.grad(hidden, parameters, draw(*hidden.shape, seed=3))])
    assert_agrees("cross_decoder_attention", "plain layers of the paper", *found)


def test_cross_attention_projects_the_memory_of_an_earlier_layer():
    """Outputs and all gradients, those of input and memory too."""
    mixer = construct(
        partial(CrossAttention, heads=4, kv_heads=2, memory_of="it", window=9), "it", width=WIDTH
    ).double()
    randomise(mixer)
    x, memory = (draw(2, LENGTH, WIDTH, seed=seed).requires_grad_() for seed in (1, 2))
    q, k, v = (y.unflatten(-1, (-1, 8)) for y in (mixer.query(x), mixer.key(memory), mixer.value(memory)))
    expected = mixer.output(dense_attention(rotated(q), rotated(k), v, 9))
    found = mixer(x, Sequence.single(Documents.whole(2, LENGTH)), memory)
    leaves, dout = [x, memory, *mixer.parameters()], draw(2, LENGTH, WIDTH, seed=3)
    results = [[out, *torch.autograd.grad(out, leaves, dout)] for out in (found, expected)]
    assert_agrees("cross_attention", "dense weights of the paper", *results)


@pytest.mark.parametrize("norm", [False, True])
def test_a_gated_memory_unit_gates_what_mamba_reads_from_its_state(norm):
    """Outputs, and gradients of both inputs and all parameters: Mamba's own layer reads the memory, and the unit."""
    seq = Sequence.single(Documents.whole(2, 21))
    mamba = construct(partial(Mamba, state=4, publish=True), "mamba", width=WIDTH, name="mamba").double()
    unit = construct(partial(GatedMemoryUnit, memory_of="mamba", norm=norm, bias=True), "unit", width=WIDTH).double()
    randomise(mamba)
    randomise(unit)
    assert mamba.publishes == unit.reads
    x, other = (draw(2, 21, WIDTH, seed=seed).requires_grad_() for seed in (1, 2))
    leaves = [x, other, *mamba.parameters(), *unit.parameters()]
    douts = [draw(2, 21, WIDTH, seed=seed) for seed in (3, 4)]

    out, memory = mamba(x, seq)
    outs = [out, unit(other, seq, memory)]
    plain = construct(partial(Mamba, state=4), "mamba", width=WIDTH).double()  # without the part after the scan
    values = dict(mamba.named_parameters())
    seen = []
    plain.output.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    torch.func.functional_call(plain, values, (x, seq))
    read = seen[0] / torch.nn.functional.silu(mamba.gate(x))
    product = torch.nn.functional.silu(unit.gate(other)) * read
    if norm:
        product = product * (product.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * unit.norm.weight
    expected = [mamba.output(seen[0]), unit.output(product)]
    assert_agrees(
        "gated_memory_unit",
        "plain formula of the paper",
        [*outs, *torch.autograd.grad(outs, leaves, douts)],
        [*expected, *torch.autograd.grad(expected, leaves, douts)],
    )
