"""The Forgetting Transformer (FoX, Lin et al., 2025, arXiv 2503.02130) without norms of queries and keys."""

from typing import Any

from ....mixers.softmax.forgetting_attention import ForgettingAttention
from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed
from ...flash_linear_attention import AFFINE, SWISH, attention, flash_linear_attention
from ...rules import Absent


class OutputGate(Field):
    """`use_output_gate`: whether each channel of the output has a gate."""

    def read(self, reader: ConfigReader) -> str | None:
        return "channel" if reader.flag("use_output_gate") else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value not in (None, "channel"):
            writer.refuse(setting, value)
        writer.put("use_output_gate", value == "channel", setting)


MIXER = attention(
    rope_base=Fixed(None),
    window=Fixed(None),
    kv_shift=Fixed(False),
    output_norm=Fixed(False),
    gate=OutputGate(),
).but(target=ForgettingAttention, names={"forget": "attn.f_proj", "gate.project": "attn.g_proj"})
FAMILY = flash_linear_attention(
    "forgetting_transformer",
    "ForgettingTransformerForCausalLM",
    MIXER,
    alone=True,
    defaults={"num_heads": 32},
    rules=(
        SWISH,
        AFFINE,
        Absent("qk_norm", "Its norms have a weight for each channel of each head"),
        Absent("window_size", "Its layers do not look at it"),
    ),
)
