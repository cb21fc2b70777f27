"""Kimi Delta Attention in every layer (Kimi Linear, 2025, arXiv 2510.26692)."""

from collections.abc import Mapping
from typing import Any

from ....mixers.delta.kimi_delta_attention import KimiDeltaAttention
from ...components import Component
from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed, Flag, Integer, Unread
from ...flash_linear_attention import DELTA, SWISH, Expanded, Taps, ValueHeads, flash_linear_attention


class LowerBound(Field):
    """`lower_bound`, a negative number, or None; `safe_gate` tells fast kernels that there is one, of at least -5."""

    def read(self, reader: ConfigReader) -> float | None:
        bound, safe = reader.get("lower_bound"), reader.flag("safe_gate")
        if bound is None and not safe:
            return None
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound < 0:
            reader.problem(f"lower_bound must be negative, or null without safe_gate; got {bound!r}")
            return -5.0
        return float(bound)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("lower_bound", value, setting)
        writer.put("safe_gate", value is not None and value >= -5, setting)


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    size = arguments["head_dim"] or arguments["width"] // arguments["heads"]
    resolved = {**arguments, "head_dim": size, "value_dim": arguments["value_dim"] or size}
    resolved["key_heads"] = arguments["key_heads"] or arguments["heads"]
    if resolved["gate_rank"] == resolved["value_dim"]:
        resolved["gate_rank"] = None
    return resolved


FAMILY = flash_linear_attention(
    "kda",
    "KDAForCausalLM",
    Component(
        KimiDeltaAttention,
        {
            "key_heads": Integer("num_heads"),
            "heads": ValueHeads(),
            "head_dim": Integer("head_dim"),
            "value_dim": Expanded("expand_v", "head_dim", heads=None),
            "gate_bias": Fixed(True),
            "lower_bound": LowerBound(),
            "conv_size": Taps(),
            "negative_eigenvalues": Flag("allow_neg_eigval"),
            "norm_eps": Unread("norm_eps"),
        },
        {
            **{name: place for name, place in DELTA.names.items() if name != "gate"},
            "decay.down": "attn.f_proj.0",
            "decay.up": "attn.f_proj.1",
            "decay_gate.A_log": "attn.A_log",
            "decay_gate.dt_bias": "attn.dt_bias",
            "gate.down": "attn.g_proj.0",
            "gate.up": "attn.g_proj.1",
        },
        _resolve,
    ),
    defaults={"num_heads": 16, "head_dim": 128, "expand_v": 1.0, "use_short_conv": True},
    rules=(SWISH,),
)
