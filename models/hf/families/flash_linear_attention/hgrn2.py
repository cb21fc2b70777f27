"""HGRN2 (Qin et al., 2024, arXiv 2404.07904): HGRN with a matrix for a state."""

from collections.abc import Mapping
from typing import Any

from ....mixers.linear.hgrn2 import HGRN2
from ...components import Component
from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed, Flag
from ...flash_linear_attention import AFFINE, LOWER_BOUNDS, SWISH, flash_linear_attention, projections
from ...rules import Absent


class Heads(Field):
    """`hidden_size` over `expand_ratio`, or `num_heads` where the latter is null."""

    def read(self, reader: ConfigReader) -> int:
        if reader.get("expand_ratio") is None:
            return reader.integer("num_heads")
        width, size = reader.integer("hidden_size"), reader.integer("expand_ratio")
        if width % size:
            reader.problem(f"expand_ratio must divide hidden_size = {width}; got {size}")
        reader.get("num_heads")
        return max(1, width // size)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("num_heads", value, setting)
        writer.put("expand_ratio", writer.config.get("hidden_size", value) // value, setting)


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    square = arguments["key_dim"] == arguments["width"] // arguments["heads"]
    return {**arguments, "key_dim": None} if square else arguments


FAMILY = flash_linear_attention(
    "hgrn2",
    "HGRN2ForCausalLM",
    Component(
        HGRN2,
        {
            "heads": Heads(),
            "lower_bounds": Flag("use_lower_bound", default=True),
            "norm_eps": Fixed(1e-5),  # whatever that of the model
        },
        {
            **projections(query="q", forget="f", value="i", output="o"),
            "norm": "attn.g_norm",
            "bounds.weight": LOWER_BOUNDS,
        },
        _resolve,
    ),
    defaults={"expand_ratio": 128},
    rules=(SWISH, AFFINE, Absent("use_short_conv", "Its layers have no convolution here")),
)
