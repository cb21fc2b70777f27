"""Latent attention against transformers: layers of DeepSeek-V3, Kimi Linear and Ling 3, and a DeepSeek-V3 model.

And the gate of Qwen3-Next's attention.
"""

from functools import partial

import pytest
import torch
from definitions import definitions_of
from latent_oracles import (
    HEADS,
    KEY,
    LENGTH,
    OURS,
    RANK,
    ROPE,
    SIZES,
    WIDTH,
    angles,
    as_ours,
    exact,
    model_as_ours,
)
from model_presets import feed_forward
from oracles import assert_agrees, draw, whole, with_gradients
from torch import nn
from torch.nn import functional as F

from longreach.kernels.latent import state_bytes
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import DecodingCache, Sequence


def compare(
    mixer: LatentAttention, theirs: nn.Module, call, oracle: str, *, interleaved: bool, tolerance: float = 1e-9
) -> None:
    mixer = mixer.double()
    mixer.load_state_dict(as_ours({name: x.detach() for name, x in theirs.named_parameters()}, interleaved))
    x, names = draw(2, LENGTH, WIDTH), [name for name, _ in theirs.named_parameters()]
    expected = with_gradients(call, x, theirs.parameters())
    gradients = as_ours(dict(zip(names, expected[2:], strict=True)), interleaved)
    found = with_gradients(lambda x: mixer(x, whole(2, LENGTH)), x, mixer.parameters())
    assert_agrees(
        "latent_attention", oracle, found, [*expected[:2], *(gradients[name] for name, _ in mixer.named_parameters())],
        tolerance=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("query_rank", [None, 10])
def test_latent_attention_is_that_of_deepseek_v3_in_transformers(query_rank):
    modeling = definitions_of("deepseek_v3")
    config = modeling.DeepseekV3Config(
        **SIZES, q_lora_rank=query_rank, attention_bias=query_rank is not None, attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    )  # fmt: skip
    theirs, rotary = exact(modeling.DeepseekV3Attention(config, 0)), modeling.DeepseekV3RotaryEmbedding(config)
    position = angles(torch.arange(LENGTH)[None], rotary)
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 4.0, "attention_factor": 1.0}
    ours = LatentAttention(
        width=WIDTH, query_rank=query_rank, rope_scaling=scaling, scale=theirs.scaling, bias=query_rank is not None,
        output_bias=query_rank is not None, **OURS,
    )  # fmt: skip
    assert theirs.scaling != (KEY + ROPE) ** -0.5
    call = lambda x: theirs(x, position, None)[0]  # noqa: E731
    compare(ours, theirs, call, "transformers, DeepseekV3Attention", interleaved=True)


def test_latent_attention_is_that_of_kimi_linear_in_transformers():
    modeling = definitions_of("kimi_linear")
    config = modeling.KimiLinearConfig(
        **SIZES, q_lora_rank=None, num_hidden_layers=1, layer_types=["full_attention"], attn_implementation="sdpa"
    )
    theirs = exact(modeling.KimiLinearAttention(config, 0))
    ours = LatentAttention(width=WIDTH, rope_base=None, **OURS)
    compare(ours, theirs, lambda x: theirs(x, None)[0], "transformers, KimiLinearAttention", interleaved=False)


def test_its_gate_per_head_is_that_of_ling_3_in_transformers():
    """Which is computed in float32 there."""
    modeling = definitions_of("bailing_hybrid")
    config = modeling.BailingHybridConfig(**SIZES, attn_implementation="sdpa", attention_bias=False)
    theirs, rotary = (
        exact(modeling.BailingHybridAttention(config, 0)), modeling.BailingHybridRotaryEmbedding(config),
    )  # fmt: skip
    position = angles(torch.arange(LENGTH)[None], rotary)
    base = config.rope_parameters["rope_theta"]
    ours = LatentAttention(width=WIDTH, gate="head", rope_base=base, **OURS)
    call = lambda x: theirs(x, position, None)[0]  # noqa: E731
    compare(ours, theirs, call, "transformers, BailingHybridAttention", interleaved=True, tolerance=1e-6)


def test_the_gate_per_channel_is_that_of_qwen3_next_in_transformers():
    """Whose queries and gates are rows of one matrix, and whose norms, float32 inside, add 1 to their weights."""
    modeling = definitions_of("qwen3_next")
    config = modeling.Qwen3NextConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=8, attention_bias=True,
        partial_rotary_factor=0.5, attn_implementation="sdpa",
    )  # fmt: skip
    theirs, rotary = exact(modeling.Qwen3NextAttention(config, 0)), modeling.Qwen3NextRotaryEmbedding(config)
    position = angles(torch.arange(LENGTH)[None], rotary)
    ours = SoftmaxAttention(
        width=WIDTH, heads=HEADS, kv_heads=2, head_dim=8, rope_base=config.rope_parameters["rope_theta"],
        rope_fraction=2 * rotary.inv_freq.numel() / 8, qk_norm="head", norm_eps=config.rms_norm_eps, gate="channel",
        gate_bias=True, bias=True, output_bias=True,
    ).double()  # fmt: skip

    def as_ours(values, added):
        made = {f"{kind}_norm.weight": values[f"{kind[0]}_norm.weight"] + added for kind in ("query", "key")}
        for part in ("weight", "bias"):
            query, gate = values[f"q_proj.{part}"].unflatten(0, (HEADS, 2, 8)).unbind(1)
            made |= {f"query.{part}": query.flatten(0, 1), f"gate.project.{part}": gate.flatten(0, 1)}
            names = {"key": "k_proj", "value": "v_proj", "output": "o_proj"}
            made |= {f"{name}.{part}": values[f"{other}.{part}"] for name, other in names.items()}
        return made

    ours.load_state_dict(as_ours({name: x.detach() for name, x in theirs.named_parameters()}, 1.0))
    x, names = draw(2, LENGTH, WIDTH), [name for name, _ in theirs.named_parameters()]
    expected = with_gradients(lambda x: theirs(x, position, None)[0], x, theirs.parameters())
    gradients = as_ours(dict(zip(names, expected[2:], strict=True)), 0.0)
    found = with_gradients(lambda x: ours(x, whole(2, LENGTH)), x, ours.parameters())
    theirs = [*expected[:2], *(gradients[name] for name, _ in ours.named_parameters())]
    assert_agrees("softmax_attention", "transformers, Qwen3NextAttention", found, theirs, tolerance=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_dim": 0}, "rope_base must be null and rope_heads 1 with rope_dim=0"),
        ({"rope_dim": 7}, "rope_fraction must leave an even number"),
        ({"latent_rank": 0}, "latent_rank must be at least 1; got 0"),
        ({"query_rank": -1}, "query_rank must be at least 1; got -1"),
        ({"key_dim": 0, "rope_dim": 0, "rope_base": None}, r"key_dim \+ rope_dim must be at least 1"),
        ({"gate": "row"}, "gate must be one of null, head, channel; got 'row'"),
        ({"gate_rank": 4}, "gate_rank and gate_bias must come with a gate"),
        ({"gate": "head", "gate_rank": 0}, "gate_rank must be at least 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LatentAttention(width=WIDTH, **{**OURS, **change})


def test_decoding_keeps_the_latent_and_the_shared_key_alone():
    mixer, cache = LatentAttention(width=WIDTH, **OURS).double(), DecodingCache()
    for length in (21, 1, 1):
        mixer(draw(1, length, WIDTH), Sequence.decoding(cache, 1, length))
        cache.advance(length)
    (rows,) = cache.rows.values()
    assert [x.shape[2:] for x in rows.tensors] == [(ROPE + RANK,)]
    assert rows.kept * (ROPE + RANK) * 8 == state_bytes(23, latent_dim=RANK, shared_dim=ROPE, element_bytes=8)
    assert cache.bytes == rows.tensors[0].shape[1] * (ROPE + RANK) * 8


def test_a_model_of_it_is_deepseek_v3_in_transformers():
    """Logits, loss and all gradients, of the dense layers with which such a model begins."""
    modeling = definitions_of("deepseek_v3")
    config = modeling.DeepseekV3Config(
        **SIZES, q_lora_rank=10, vocab_size=61, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=48,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = exact(modeling.DeepseekV3ForCausalLM(config))
    mixer = partial(LatentAttention, query_rank=10, **OURS)
    ours = LanguageModel(
        vocabulary=61, width=WIDTH, depth=2, pattern=["mla"], mixers={"mla": mixer}, feed_forward=feed_forward(48)
    ).double()
    ours.load_state_dict(model_as_ours(theirs, {name: x.detach() for name, x in theirs.named_parameters()}))
    tokens = torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, dims=1).index_fill(1, torch.tensor([LENGTH - 1]), -100)
    logits, expected = ours(tokens, whole(2, LENGTH)), theirs(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(logits, expected.logits, atol=1e-9, rtol=1e-9)
    loss, count = ours(tokens, whole(2, LENGTH), targets)
    their_loss = F.cross_entropy(expected.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss / count, their_loss, atol=1e-9, rtol=1e-9)
    (loss / count).backward()
    their_loss.backward()
    gradients = model_as_ours(theirs, {name: x.grad for name, x in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-9)
