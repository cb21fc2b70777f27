"""Llama 4's language model (Meta, 2025): attention within chunks, layers without positions, experts in some layers."""

from collections.abc import Mapping
from typing import Any

from ...components import ATTENTION, GATED_MLP, INTERLEAVED, MIXTURE, MODEL
from ...family import RULES, Family
from ...fields import Fixed, Flag, Integer, Number, Quotient, Unread
from ...layers import DENSE, EXPERTS, ByPositions, Numbered
from ...optional import Switch, Where
from ...rope import RopeBase, RopeScale
from ...rules import Known, Only
from ...tensors import inputs_first, of_experts

# By whether a layer attends within chunks, and whether it has positions.
NAMES = {
    ("chunked", True): "chunked", ("full", False): "full", ("full", True): "rotary", ("chunked", False): "unplaced",
}  # fmt: skip
KINDS = {"chunked_attention": "chunked", "full_attention": "full"}

GATE_AND_VALUES = "feed_forward.experts.gate_up_proj"


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first versions had a number for whether logits grow."""
    new = dict(config)
    if isinstance(tuned := new.get("attn_temperature_tuning"), int):
        new["attn_temperature_tuning"] = bool(tuned)
    return new


attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
    head_dim=Integer("head_dim", Quotient("hidden_size", "num_attention_heads"), absent=128),
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
)
rotary = attention.but(
    rope_base=RopeBase(5e5),
    rope_scaling=RopeScale(kinds=("linear", "dynamic", "llama3")),  # their norms undo what else YaRN does to logits
    qk_norm=Switch("use_qk_norm", "unweighted", default=True),
    norm_eps=Unread("rms_norm_eps"),
    names=INTERLEAVED,
)
unplaced = attention.but(
    rope_base=Fixed(None),
    rope_scaling=Fixed(None),
    temperature=Where("attn_temperature_tuning", Number("attn_scale", 0.1), default=True),
    temperature_length=Where("attn_temperature_tuning", Integer("floor_scale", 8192), default=True),
)
chunk = Integer("attention_chunk_size", 8192)

FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    within=("llama4",),
    yields_to=("llama",),
    mixers={
        "chunked": rotary.but(block=chunk),
        "full": unplaced,
        "rotary": rotary,
        "unplaced": unplaced.but(block=chunk),
    },
    layers=ByPositions(NAMES, KINDS, lambda reader, placed: "chunked" if placed else "full"),
    feed_forwards={
        DENSE: GATED_MLP.moved("mlp.", "feed_forward.").but(hidden=Integer("intermediate_size_mlp", 16384)),
        EXPERTS: MIXTURE.but(
            hidden=Integer("intermediate_size", 8192),
            shared_hidden=Integer("intermediate_size", 8192),
            experts=Integer("num_local_experts", 16),
            experts_per_token=Integer("num_experts_per_tok", 1),
            score=Fixed("sigmoid"),
            renormalise=Fixed(False),
            weigh_inputs=Fixed(True),
            names={
                "router.weight": "feed_forward.router.weight",
                "experts.gate.weight": inputs_first(GATE_AND_VALUES, of_experts(0)),
                "experts.up.weight": inputs_first(GATE_AND_VALUES, of_experts(1)),
                "experts.down.weight": inputs_first("feed_forward.experts.down_proj"),
                "shared.gate": "feed_forward.shared_expert.gate_proj",
                "shared.up": "feed_forward.shared_expert.up_proj",
                "shared.down": "feed_forward.shared_expert.down_proj",
            },
        ),
    },
    feed_forward_layers=Numbered("moe_layers", EXPERTS, DENSE, step="interleave_moe_layer_step"),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(
        *RULES,
        Only("router_jitter_noise", (0.0, 0)),
        Known(("no_rope_layer_interval", "interleave_moe_layer_step", "for_llm_compressor", "intermediate_size",
               "intermediate_size_mlp", "use_qk_norm", "attn_temperature_tuning", "attn_scale", "floor_scale",
               "attention_chunk_size", "num_local_experts", "num_experts_per_tok", "rope_scaling", "rope_theta",
               "rope_parameters")),
    ),
    current=_current,
)  # fmt: skip
