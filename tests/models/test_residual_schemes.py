"""Residual schemes against the models of transformers that have them: outputs and every gradient."""

from functools import partial

import pytest
import torch
from definitions import definitions_of
from model_presets import build_model, randomise, tokens
from oracles import draw, whole
from torch import nn

from longreach.models.block import SandwichBlock, SideBySide
from longreach.models.part import FeedForward

LENGTH, VOCABULARY = 29, 61
IN_FLOAT32 = 1e-4  # theirs computes norms, rotations and scans in float32


class Foreign(FeedForward):
    """A module of transformers as a part of a block."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x, seq):
        return self.call(self.module, x)


def assert_near(actual, expected, tolerance):
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape, number
        ours, theirs = ours.detach().double(), theirs.detach().double()
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= tolerance, f"tensor {number}: relative error {error:.2e}"


def assert_same_model(ours, theirs, renamed):
    """`renamed(of)`: their parameters, or what `of` makes of them, by our names."""
    ours.load_state_dict(renamed(lambda parameter: parameter.detach()))
    inputs, dout = tokens(2, LENGTH, VOCABULARY), draw(2, LENGTH, VOCABULARY)
    logits = [ours(inputs, whole(2, LENGTH)), theirs(inputs).logits]
    for each in logits:
        each.backward(dout)
    expected = renamed(lambda parameter: parameter.grad)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() <= expected.keys()
    assert_near([logits[0], *found.values()], [logits[1], *(expected[name] for name in found)], IN_FLOAT32)


def rotated_by_halves(weight, head_dim):
    """Rows of a projection whose pairs (2i, 2i + 1) are rotated, in the order in which pairs are (i, i + half)."""
    heads = weight.unflatten(0, (-1, head_dim))
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


def test_command_a_is_cohere2_of_transformers():
    """With attention and feed-forward layer beside each other, layer norms, windows and the logits' multiplier."""
    modeling = definitions_of("cohere2")
    config = modeling.Cohere2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, logit_scale=0.25, rope_parameters={"rope_type": "default",
        "rope_theta": 50000.0}, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.Cohere2ForCausalLM(config).double().eval()
    randomise(theirs)
    heads = {"heads": 4, "kv_heads": 2}
    ours = build_model(
        "command_a_tiny",
        width=32,
        mixers={"window": {**heads, "window": 5}, "full": heads},
        feed_forward={"hidden": 40},
    ).double()

    def renamed(of):
        named = {"embedding.weight": of(theirs.model.embed_tokens.weight), "norm.weight": of(theirs.model.norm.weight)}
        named["head.weight"] = named["embedding.weight"]
        for number, layer in enumerate(theirs.model.layers):
            turn = partial(rotated_by_halves, head_dim=8) if number < 3 else lambda weight: weight
            attention, mlp = layer.self_attn, layer.mlp
            parts = {
                "norm": of(layer.input_layernorm.weight), "mixer.query": turn(of(attention.q_proj.weight)),
                "mixer.key": turn(of(attention.k_proj.weight)), "mixer.value": of(attention.v_proj.weight),
                "mixer.output": of(attention.o_proj.weight), "feed_forward.gate": of(mlp.gate_proj.weight),
                "feed_forward.up": of(mlp.up_proj.weight), "feed_forward.down": of(mlp.down_proj.weight),
            }  # fmt: skip
            named |= {f"blocks.{number}.{name}.weight": weight for name, weight in parts.items()}
        return named

    assert_same_model(ours, theirs, renamed)


@pytest.mark.slow
def test_recurrent_gemma_is_the_one_of_transformers():
    """With biases of feed-forward layers, a cap on the logits, positions in half of a head, and a root in bfloat16."""
    modeling = definitions_of("recurrent_gemma")
    config = modeling.RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, attention_window_size=5, logits_soft_cap=5.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.RecurrentGemmaForCausalLM(config).double().eval()
    randomise(theirs)
    ours = build_model(
        "recurrent_gemma_tiny", width=32, depth=3, pattern=["rglru*2", "window"], feed_forward={"hidden": 40},
        mixers={"rglru": {"blocks": 4}, "window": {"heads": 4, "window": 5}}, embedding_multiplier=5.65625,
        logit_softcap=5.0,
    ).double()  # fmt: skip

    def renamed(of):
        named = {"embedding.weight": of(theirs.model.embed_tokens.weight)}
        named |= {"head.weight": named["embedding.weight"], "norm.weight": of(theirs.model.final_norm.weight)}
        for number, layer in enumerate(theirs.model.layers):
            block, mlp = layer.temporal_block, layer.mlp_block
            linear = {f"feed_forward.{name}": getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
            tensors = {}
            if number < 2:
                unit = block.rg_lru
                linear |= {
                    "mixer.value": block.linear_x, "mixer.gate": block.linear_y, "mixer.output": block.linear_out,
                }  # fmt: skip
                tensors = {
                    "mixer.conv.weight": of(block.conv_1d.weight).squeeze(1), "mixer.conv.bias": of(block.conv_1d.bias),
                    "mixer.Lambda": of(unit.recurrent_param),
                    "mixer.recurrence_gate.weight": of(unit.recurrent_gate_weight).transpose(1, 2),
                    "mixer.input_gate.weight": of(unit.input_gate_weight).transpose(1, 2),
                    "mixer.recurrence_bias": of(unit.recurrent_gate_bias).flatten(),
                    "mixer.input_bias": of(unit.input_gate_bias).flatten(),
                }  # fmt: skip
            else:
                linear |= {
                    f"mixer.{name}": getattr(block, f"{name[0]}_proj") for name in ("query", "key", "value", "output")
                }
            tensors |= {f"{name}.weight": of(each.weight) for name, each in linear.items()}
            tensors |= {f"{name}.bias": of(each.bias) for name, each in linear.items() if each.bias is not None}
            tensors["mixer_norm.weight"] = of(layer.temporal_pre_norm.weight)
            tensors["feed_forward_norm.weight"] = of(layer.channel_pre_norm.weight)
            named |= {f"blocks.{number}.{name}": tensor for name, tensor in tensors.items()}
        return named

    assert_same_model(ours, theirs, renamed)


@pytest.mark.slow
def test_gemma3_is_the_one_of_transformers():
    """With norms on both sides of each part, two rope bases of which one is scaled, and a scale of the logits."""
    modeling = definitions_of("gemma3")
    config = modeling.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, sliding_window=5, query_pre_attn_scalar=25, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }, attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.Gemma3ForCausalLM(config).double().eval()
    randomise(theirs)
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 10, "scale": 0.2}
    ours = build_model(
        "gemma3_tiny", width=32, mixers={"window": {**heads, "window": 5}, "full": heads}, feed_forward={"hidden": 40},
        embedding_multiplier=32**0.5,
    ).double()  # fmt: skip

    def renamed(of):
        named = {"embedding.weight": of(theirs.model.embed_tokens.weight), "norm.weight": of(theirs.model.norm.weight)}
        named["head.weight"] = named["embedding.weight"]
        for number, layer in enumerate(theirs.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            norms = {
                "mixer_norm": layer.input_layernorm, "mixer_output_norm": layer.post_attention_layernorm,
                "feed_forward_norm": layer.pre_feedforward_layernorm,
                "feed_forward_output_norm": layer.post_feedforward_layernorm,
                "mixer.query_norm": attention.q_norm, "mixer.key_norm": attention.k_norm,
            }  # fmt: skip
            parts = {
                "mixer.query": attention.q_proj, "mixer.key": attention.k_proj, "mixer.value": attention.v_proj,
                "mixer.output": attention.o_proj, "feed_forward.gate": mlp.gate_proj, "feed_forward.up": mlp.up_proj,
                "feed_forward.down": mlp.down_proj,
            }  # fmt: skip
            named |= {f"blocks.{number}.{name}.weight": of(each.weight) for name, each in (norms | parts).items()}
        return named

    assert_same_model(ours, theirs, renamed)


@pytest.mark.parametrize("output_norm", [None, "gate_first", "norm_first"])
def test_falcon_h1_is_the_one_of_transformers(output_norm):
    """With Mamba-2 and attention side by side, and each of its multipliers another number."""
    modeling = definitions_of("falcon_h1")
    parts = dict(zip(("gate", "value", "key", "query", "step"), (0.9, 1.2, 0.7, 1.4, 0.6), strict=True))
    config = modeling.FalconH1Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=5,
        mamba_chunk_size=16, mamba_rms_norm=output_norm is not None, mamba_norm_before_gate=output_norm == "norm_first",
        embedding_multiplier=1.7, lm_head_multiplier=0.3, key_multiplier=0.8, attention_in_multiplier=1.1,
        attention_out_multiplier=0.95, ssm_in_multiplier=1.25, ssm_out_multiplier=0.4, mlp_multipliers=[0.85, 0.6],
        ssm_multipliers=list(parts.values()), rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.FalconH1ForCausalLM(config).double().eval()
    randomise(theirs)
    ours = build_model(
        "falcon_h1_tiny", width=32, depth=2, embedding_multiplier=1.7, logit_multiplier=0.3,
        mixers={
            "mamba2": {"head_dim": 8, "state": 5, "groups": 2, "output_norm": output_norm, "multipliers": parts},
            "softmax": {"heads": 4, "kv_heads": 2, "key_multiplier": 0.8},
        },
        side_by_side={
            "input_multipliers": {"softmax": 1.1, "mamba2": 1.25}, "multipliers": {"softmax": 0.95, "mamba2": 0.4},
        },
        feed_forward={"hidden": 40, "gate_multiplier": 0.85, "down_multiplier": 0.6},
    ).double()  # fmt: skip

    def renamed(of):
        named = {
            "embedding.weight": of(theirs.model.embed_tokens.weight), "head.weight": of(theirs.lm_head.weight),
            "norm.weight": of(theirs.model.final_layernorm.weight),
        }  # fmt: skip
        for number, layer in enumerate(theirs.model.layers):
            attention, mamba, mlp = layer.self_attn, layer.mamba, layer.feed_forward
            split = of(mamba.in_proj.weight).split([48, 48, 10, 10, 6])
            parts = {
                "mixer_norm.weight": of(layer.input_layernorm.weight),
                "feed_forward_norm.weight": of(layer.pre_ff_layernorm.weight),
                "feed_forward.gate.weight": of(mlp.gate_proj.weight),
                "feed_forward.up.weight": of(mlp.up_proj.weight), "feed_forward.down.weight": of(mlp.down_proj.weight),
                "mixer.mamba2.conv.weight": of(mamba.conv1d.weight).squeeze(1),
                "mixer.mamba2.conv.bias": of(mamba.conv1d.bias),
                "mixer.mamba2.output.weight": of(mamba.out_proj.weight),
            }  # fmt: skip
            if output_norm is not None:
                parts["mixer.mamba2.norm.weight"] = of(mamba.norm.weight)
            for name, weight in zip(("gate", "value", "key", "query", "step"), split, strict=True):
                parts[f"mixer.mamba2.{name}.weight"] = weight
            parts |= {f"mixer.mamba2.{name}": of(getattr(mamba, name)) for name in ("dt_bias", "A_log", "D")}
            for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                parts[f"mixer.softmax.{name}.weight"] = of(getattr(attention, f"{their}_proj").weight)
            named |= {f"blocks.{number}.{name}": weight for name, weight in parts.items()}
        return named

    assert_same_model(ours, theirs, renamed)


def test_sandwich_norms_are_those_of_gemma_2():
    modeling = definitions_of("gemma2")
    config = modeling.Gemma2Config(
        hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    theirs = modeling.Gemma2DecoderLayer(config, 0).double().eval()
    randomise(theirs)
    x = draw(2, LENGTH, 24)
    where = torch.arange(LENGTH).expand(2, -1)
    turns = modeling.Gemma2RotaryEmbedding(config)(x, where)
    unseen = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    given = {"position_embeddings": turns, "attention_mask": unseen}
    parts = {
        "mixer": Foreign(theirs.self_attn, lambda attention, x: attention(x, **given)[0]),
        "feed_forward": Foreign(theirs.mlp, lambda mlp, x: mlp(x)),
    }
    ours = SandwichBlock(parts=parts, width=24, norm_eps=config.rms_norm_eps).double()
    norms = {
        "mixer_norm": theirs.input_layernorm, "mixer_output_norm": theirs.post_attention_layernorm,
        "feed_forward_norm": theirs.pre_feedforward_layernorm,
        "feed_forward_output_norm": theirs.post_feedforward_layernorm,
    }  # fmt: skip
    with torch.no_grad():
        for name, norm in norms.items():
            ours.get_submodule(name).weight.copy_(1 + norm.weight)  # Gemma's weights count from 1
    found = []
    for call in (lambda x: ours(x, whole(2, LENGTH)), lambda x: theirs(x, **given)):
        leaf = x.clone().requires_grad_()
        theirs.zero_grad()
        out = call(leaf)
        out.backward(draw(2, LENGTH, 24, seed=1))
        shared = [parameter.grad.clone() for part in (theirs.self_attn, theirs.mlp) for parameter in part.parameters()]
        found.append([out.detach(), leaf.grad, *shared])
    assert_near(found[0], found[1], IN_FLOAT32)
    assert_near([ours.get_submodule(name).weight.grad for name in norms], [n.weight.grad for n in norms.values()], 1e-4)


def test_a_multiplier_is_of_a_mixer_of_the_model():
    parts = {name: Foreign(nn.Identity(), None) for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"side_by_side.multipliers must be of mixers by .* \(a, b\); got c. Rename"):
        SideBySide(parts=parts, width=8, multipliers={"c": 2.0})
    assert SideBySide(parts=parts, width=8, multipliers={"c": 2.0}, known=("a", "b", "c")).multipliers == {"c": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_softcap": 0.0}, "model.logit_softcap must be positive; got 0.0"),
        ({"embedding_multiplier": 0.0}, "model.embedding_multiplier must be positive; got 0.0"),
        (
            {"mixers": {"softmax": {"qk_norm": "head"}}},
            "key_multiplier must be 1 with a qk_norm, which undoes it; got 0.5",
        ),
        ({"mixers": {"mamba2": {"output_norm": "rms"}}}, "output_norm must be one of gate_first, norm_first, None"),
        ({"mixers": {"mamba2": {"multipliers": {"delta": 2.0}}}}, "multipliers must be of gate, value, .*; got delta"),
    ],
)
def test_multipliers_that_do_not_fit_are_refused(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("falcon_h1_tiny", **changes)
