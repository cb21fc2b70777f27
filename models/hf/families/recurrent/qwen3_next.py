"""Qwen3-Next (Qwen team, 2025): Gated DeltaNet, gated attention, experts with a gated one for all."""

from collections.abc import Mapping
from typing import Any

from ....mixers.delta.gated_deltanet import GatedDeltaNet
from ...components import ATTENTION, GATED_MLP, MIXTURE, MODEL, Component
from ...family import RULES, Family, renamed
from ...fields import Fixed, Flag, Integer, Unread
from ...layers import DENSE, EXPERTS, FULL, LINEAR, ExpertsBut, LayerTypes, every_nth_full
from ...rope import RopeBase, RopePart, RopeScale
from ...rules import Known
from ...tensors import Weight, convolution, rows_of

KINDS = {"full_attention": FULL, "linear_attention": LINEAR}


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    size = arguments["width"] // arguments["heads"]
    defaults = {"key_heads": arguments["heads"], "key_dim": size, "value_dim": size}
    return {**arguments, **{name: value for name, value in defaults.items() if arguments[name] is None}}


def _input(number: int) -> Weight:
    """Of the queries, keys, values and gates of each key head, one."""

    def rows(mixer: GatedDeltaNet) -> Any:
        values = mixer.heads // mixer.key_heads * mixer.value_dim
        return rows_of(number, (mixer.key_dim, mixer.key_dim, values, values), mixer.key_heads)

    return Weight("linear_attn.in_proj_qkvz", rows=rows)


def _strength(number: int) -> Weight:
    """Of the strengths and decays of each key head, one."""
    return Weight(
        "linear_attn.in_proj_ba",
        rows=lambda mixer: rows_of(number, [mixer.heads // mixer.key_heads] * 2, mixer.key_heads),
    )


def _query(number: int) -> Weight:
    """Of the query and the gate of each head, one."""
    return Weight("self_attn.q_proj", rows=lambda mixer: rows_of(number, [mixer.head_dim] * 2, mixer.heads))


DELTA = Component(
    GatedDeltaNet,
    {
        "heads": Integer("linear_num_value_heads", 32),
        "key_heads": Integer("linear_num_key_heads", 16, divides="linear_num_value_heads"),
        "key_dim": Integer("linear_key_head_dim", 128),
        "value_dim": Integer("linear_value_head_dim", 128),
        "conv_size": Integer("linear_conv_kernel_dim", 4),
        "norm_eps": Unread("rms_norm_eps"),
    },
    {
        **{name: _input(number) for number, name in enumerate(("query", "key", "value", "gate"))},
        **{name: _strength(number) for number, name in enumerate(("beta", "decay"))},
        "conv.weight": convolution("linear_attn.conv1d.weight"),
        "decay_gate.A_log": "linear_attn.A_log",
        "decay_gate.dt_bias": "linear_attn.dt_bias",
        "norm": "linear_attn.norm",
        "output": "linear_attn.out_proj",
    },
    _resolve,
)

GATED_ATTENTION = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=2, divides="num_attention_heads"),
    head_dim=Integer("head_dim", 256),
    bias=Flag("attention_bias"),
    gate_bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
    gate=Fixed("channel"),
    qk_norm=Fixed("head"),
    norm_offset=Fixed(1.0),
    norm_eps=Unread("rms_norm_eps"),
    rope_base=RopeBase(partial=True),
    rope_fraction=RopePart(0.25),
    rope_scaling=RopeScale(partial=True),
    names={
        "query": _query(0),
        "gate.project": _query(1),
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
    },
)
SHARING_MIXTURE = MIXTURE.but(
    hidden=Integer("moe_intermediate_size", 512),
    experts=Integer("num_experts", 512),
    experts_per_token=Integer("num_experts_per_tok", 10),
    renormalise=Flag("norm_topk_prob", default=True),
    shared_hidden=Integer("shared_expert_intermediate_size", 512),
    shared_gate=Fixed(True),
    names={
        "shared.gate": "mlp.shared_expert.gate_proj",
        "shared.up": "mlp.shared_expert.up_proj",
        "shared.down": "mlp.shared_expert.down_proj",
        "shared_gate": "mlp.shared_expert_gate",
    },
)

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    mixers={FULL: GATED_ATTENTION, LINEAR: DELTA},
    layers=LayerTypes(every_nth_full(4, "full_attention_interval", LINEAR), KINDS),
    feed_forwards={DENSE: GATED_MLP, EXPERTS: SHARING_MIXTURE},
    feed_forward_layers=ExpertsBut(),
    model=MODEL.but(norm=Fixed("zero_centred_rms")),
    rules=(*RULES, Known(("full_attention_interval",))),
    ignored=(r"rotary_emb\.inv_freq$", r"^mtp\."),
    yields_to=("qwen3_5_text",),
    current=renamed(num_local_experts="num_experts"),
)
