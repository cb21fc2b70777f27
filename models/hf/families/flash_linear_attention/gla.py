"""GLA (Yang et al., 2024, arXiv 2312.06635): gated linear attention."""

from ....mixers.linear.gated_linear_attention import GatedLinearAttention
from ...components import Component
from ...fields import Fixed, Integer, Unread
from ...flash_linear_attention import (
    AFFINE,
    SWISH,
    Expanded,
    Taps,
    flash_linear_attention,
    projections,
    short_convolution,
    with_sizes,
)
from ...rules import Absent, Known, Only, Same

FAMILY = flash_linear_attention(
    "gla",
    "GLAForCausalLM",
    Component(
        GatedLinearAttention,
        {
            "heads": Integer("num_heads"),
            "key_dim": Expanded("expand_k"),
            "value_dim": Expanded("expand_v"),
            "gate_rank": Fixed(16),
            "gate_normaliser": Fixed(16.0),
            "conv_size": Taps(),
            "norm_eps": Unread("norm_eps"),
        },
        {
            **projections(query="q", key="k", value="v", gate="g", output="o"),
            "conv.weight": short_convolution(),
            "decay.down": "attn.gk_proj.0",
            "decay.up": "attn.gk_proj.1",
            "norm": "attn.g_norm_swish_gate",
        },
        with_sizes(key_dim=0.5),
    ),
    defaults={"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0},
    rules=(
        SWISH,
        AFFINE,
        Same("num_kv_heads", "num_heads"),
        Only("use_output_gate", (True,)),
        Only("clamp_min", (None,)),
        Absent("feature_map", "Queries and keys have none here"),
        Known(("use_gk", "use_gv")),
    ),
    aliases=((r"\.attn\.g_norm\.", ".attn.g_norm_swish_gate."),),  # where norm and gate are not fused
)
