"""HGRN (Qin et al., 2023, arXiv 2311.04823): gated recurrences of single channels, whose gates have lower bounds."""

from ....mixers.elementwise.hgrn import HGRN
from ...components import Component
from ...fields import Flag, Number, Unread
from ...flash_linear_attention import AFFINE, LOWER_BOUNDS, SWISH, flash_linear_attention, projections
from ...rules import Absent

FAMILY = flash_linear_attention(
    "hgrn",
    "HGRNForCausalLM",
    Component(
        HGRN,
        {
            "expansion": Number("expand_ratio", 1.0),
            "lower_bounds": Flag("use_lower_bound", default=True),
            "norm_eps": Unread("norm_eps"),
        },
        {
            **projections(value="i", forget="f", gate="g", output="o"),
            "norm": "attn.g_norm",
            "bounds.weight": LOWER_BOUNDS,
        },
    ),
    defaults={},
    rules=(SWISH, AFFINE, Absent("use_short_conv", "Its layers have no convolution here")),
)
