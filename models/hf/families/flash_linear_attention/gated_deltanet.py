"""Gated DeltaNet (Yang et al., 2024, arXiv 2412.06464)."""

from typing import Any

from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed, Flag, Integer
from ...flash_linear_attention import DELTA, SWISH, Expanded, ValueHeads, flash_linear_attention, projections


class GateActivation(Field):
    """`output_gate_activation`, or None where it is the usual one or there is no gate."""

    def read(self, reader: ConfigReader) -> str | None:
        reader.only("output_gate_activation", "swish", "silu", "sigmoid")
        sigmoid = reader.get("output_gate_activation") == "sigmoid"
        return "sigmoid" if sigmoid and reader.flag("use_gate", default=True) else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("output_gate_activation", "swish" if value in (None, "silu") else value, setting)


FAMILY = flash_linear_attention(
    "gated_deltanet",
    "GatedDeltaNetForCausalLM",
    DELTA.but(
        key_heads=Integer("num_heads"),
        heads=ValueHeads(),
        key_dim=Integer("head_dim"),
        value_dim=Expanded("expand_v", "head_dim", heads=None),
        gate=Flag("use_gate", default=True),
        gate_activation=GateActivation(),
        decay=Fixed(True),
        names={
            **projections(decay="a"),
            "decay_gate.A_log": "attn.A_log",
            "decay_gate.dt_bias": "attn.dt_bias",
        },
    ),
    defaults={"num_hidden_layers": 21, "num_heads": 6, "head_dim": 256, "expand_v": 2.0, "use_short_conv": True},
    rules=(SWISH,),
)
