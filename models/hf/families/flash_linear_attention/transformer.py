"""The transformer of flash-linear-attention, with which its other models are compared."""

from typing import Any

from ...components import Component
from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed, Integer
from ...flash_linear_attention import AFFINE, SWISH, attention, flash_linear_attention
from ...layers import FULL, WINDOW, WhereNull


class HeadNorms(Field):
    """`qk_norm`: whether the queries and keys of each head are normed."""

    def read(self, reader: ConfigReader) -> str | None:
        return "head" if reader.flag("qk_norm") else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value not in (None, "head"):
            writer.refuse(setting, value)
        writer.put("qk_norm", value == "head", setting)


def _attention(window: Field) -> Component:
    return attention(window=window, qk_norm=HeadNorms(), norm_eps=Fixed(1e-5)).but(
        names={"query_norm": "attn.q_norm", "key_norm": "attn.k_norm"}
    )


FULL_ATTENTION = _attention(Fixed(None))
FAMILY = flash_linear_attention(
    "transformer",
    "TransformerForCausalLM",
    FULL_ATTENTION,
    alone=True,
    mixers={FULL: FULL_ATTENTION, WINDOW: _attention(Integer("window_size"))},
    layers=WhereNull("window_size", null=FULL, given=WINDOW),
    defaults={"num_heads": 32},
    rules=(SWISH, AFFINE),
    yields_to=("llama", "mistral", "qwen2", "qwen3"),
)
