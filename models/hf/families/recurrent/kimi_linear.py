"""Kimi Linear (arXiv 2510.26692): delta rules with a decay per channel, latent attention without positions, experts."""

from collections.abc import Mapping
from typing import Any

import torch

from ....mixers.delta.kimi_delta_attention import KimiDeltaAttention
from ...components import GATED_MLP, MODEL, Component
from ...family import RULES, Family, renamed
from ...fields import Fixed, Integer, Number, Product, Unread
from ...latent import BIASED_MIXTURE, LATENT
from ...layers import DENSE, EXPERTS, LINEAR, ExpertsFrom, LayerTypes
from ...rules import Known, Only, Replaced, Same
from ...tensors import Weight, convolution

HUB = {  # the table's keys by those of the model's own code
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
LINEAR_KEYS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
KINDS = {"full_attention": "mla", "linear_attention": LINEAR}


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Linear attention has a dict of its own on the hub, where layers are counted from 1."""
    flat = dict(renamed(**HUB)(config))
    linear = flat.pop("linear_attn_config", None) or {}
    flat |= {ours: linear[key] for key, ours in LINEAR_KEYS.items() if key in linear}
    if flat.get("layer_types") is None and linear.get("full_attn_layers") is not None:
        full = set(linear["full_attn_layers"])
        depth = range(1, flat.get("num_hidden_layers", 0) + 1)
        flat["layer_types"] = ["full_attention" if layer in full else "linear_attention" for layer in depth]
    return flat


def _as_on_the_hub(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inverse of `_current`."""
    theirs = {ours: key for key, ours in HUB.items()}
    hub = {theirs.get(key, key): value for key, value in config.items() if key not in LINEAR_KEYS.values()}
    numbered = list(enumerate(config["layer_types"], 1))
    hub["linear_attn_config"] = {key: config[ours] for key, ours in LINEAR_KEYS.items() if ours in config} | {
        "full_attn_layers": [layer for layer, kind in numbered if kind == "full_attention"],
        "kda_layers": [layer for layer, kind in numbered if kind == "linear_attention"],
    }
    return hub


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes that this family has alike."""
    size = arguments["head_dim"] or arguments["width"] // arguments["heads"]
    resolved = {**arguments, "head_dim": size}
    for name, alike in (("value_dim", size), ("gate_rank", size), ("key_heads", arguments["heads"])):
        if resolved[name] == alike:
            resolved[name] = None
    return resolved


KDA = Component(
    KimiDeltaAttention,
    {
        "heads": Integer("linear_num_heads", 32),
        "head_dim": Integer("linear_head_dim", 128),
        "conv_size": Integer("linear_conv_kernel_dim", 4),
        "norm_eps": Unread("rms_norm_eps"),
    },
    {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "conv.weight": convolution("self_attn.{}_conv1d.weight", parts=("q", "k", "v")),
        "beta": "self_attn.b_proj",
        "decay.down": "self_attn.f_a_proj",
        "decay.up": "self_attn.f_b_proj",
        "decay_gate.dt_bias": "self_attn.dt_bias",
        "decay_gate.A_log": Weight("self_attn.A_log", read=torch.flatten, write=lambda ours: ours.view(1, 1, -1, 1)),
        "gate.down": "self_attn.g_a_proj",
        "gate.up": "self_attn.g_b_proj",
        "norm": "self_attn.o_norm",
        "output": "self_attn.o_proj",
    },
    _resolve,
)

FAMILY = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    mixers={
        "mla": LATENT.but(rope_base=Fixed(None), rope_scaling=Fixed(None), scale=Fixed(None)),
        LINEAR: KDA,
    },
    layers=LayerTypes(kinds=KINDS),
    feed_forwards={
        DENSE: GATED_MLP,
        EXPERTS: BIASED_MIXTURE.but(
            names={
                "router.weight": "block_sparse_moe.gate.weight",
                "router.bias": "block_sparse_moe.gate.e_score_correction_bias",
                "experts.gate.weight": "block_sparse_moe.experts.{}.w1.weight",
                "experts.up.weight": "block_sparse_moe.experts.{}.w3.weight",
                "experts.down.weight": "block_sparse_moe.experts.{}.w2.weight",
                "shared.gate": "block_sparse_moe.shared_experts.gate_proj",
                "shared.up": "block_sparse_moe.shared_experts.up_proj",
                "shared.down": "block_sparse_moe.shared_experts.down_proj",
            },
            hidden=Integer("moe_intermediate_size", 1024),
            shared_hidden=Product("n_shared_experts", "moe_intermediate_size", default_size=1024),
            experts=Integer("num_local_experts", 256),
            experts_per_token=Integer("num_experts_per_tok", 8),
            scale=Number("routed_scaling_factor", 2.446),
        ),
    },
    feed_forward_layers=LayerTypes(
        ExpertsFrom("first_k_dense_replace", absent=1).read, {"dense": DENSE, "sparse": EXPERTS}, "mlp_layer_types"
    ),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5), tied_embeddings=Fixed(False)),
    rules=(
        *RULES,
        Replaced("tie_word_embeddings", False),  # transformers' class never ties them
        Same("num_key_value_heads", "num_attention_heads"),
        Only("q_lora_rank", (None,)),
        Only("moe_router_activation_func", ("sigmoid",)),
        Only("mla_use_nope", (True,)),
        Known(
            ("head_dim", "qk_head_dim", "use_grouped_topk", "moe_layer_freq", "first_k_dense_replace", "rope_theta",
             "rope_scaling", "rope_parameters", "num_nextn_predict_layers", "auto_map")
        ),
    ),
    # transformers writes dense layers by the name of those with experts.
    aliases=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    current=_current,
    written=_as_on_the_hub,
)  # fmt: skip
