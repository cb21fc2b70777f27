"""RetNet (Sun et al., 2023, arXiv 2307.08621): multi-scale retention."""

from ....mixers.linear.retnet import RetNet
from ...components import Component
from ...fields import Fixed, Integer, Unread
from ...flash_linear_attention import AFFINE, SWISH, Expanded, flash_linear_attention, projections, with_sizes
from ...rules import Absent, Known, Only, Same

FAMILY = flash_linear_attention(
    "retnet",
    "RetNetForCausalLM",
    Component(
        RetNet,
        {
            "heads": Integer("num_heads"),
            "key_dim": Expanded("expand_k"),
            "value_dim": Expanded("expand_v"),
            "rope_base": Fixed(10000.0),
            "norm": Fixed("rms"),
            "norm_eps": Unread("norm_eps"),
        },
        {
            **projections(query="q", key="k", value="v", gate="g", output="o"),
            "norm": "attn.g_norm_swish_gate",
        },
        with_sizes(value_dim=2.0),
    ),
    defaults={"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2},
    rules=(
        SWISH,
        AFFINE,
        Same("num_kv_heads", "num_heads"),
        Only("use_output_gate", (True,)),
        Absent("feature_map", "Queries and keys have none here"),
        Known(("use_short_conv",)),  # its layers have none
    ),
    aliases=((r"\.attn\.g_norm\.", ".attn.g_norm_swish_gate."),),  # where norm and gate are not fused
)
