"""Falcon-H1 (arXiv 2507.22448): Mamba-2 and attention side by side in every layer, and multipliers everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....block import SideBySide
from ....mixers.state_space.mamba2 import MULTIPLIED
from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL, Component
from ...config import ConfigReader, ConfigWriter
from ...family import RULES, Family
from ...fields import Entries, Entry, Field, Fixed, Flag, Integer, Number, OfMixers, Unread
from ...layers import DENSE, FULL, LINEAR, Every
from ...rules import Known, Only, Rule, Same
from ...state_space import HYBRID_MAMBA2, HeadsTimesSize

HEADS, SIZE, INNER = "mamba_n_heads", "mamba_d_head", "mamba_d_ssm"


@dataclass(frozen=True)
class OutputNorm(Field):
    """Whether the state space has a norm, by one key, and by another whether it stands before its gate."""

    def read(self, reader: ConfigReader) -> str | None:
        first = reader.flag("mamba_norm_before_gate", default=True)
        return ("norm_first" if first else "gate_first") if reader.flag("mamba_rms_norm") else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("mamba_rms_norm", value is not None, setting)
        if value is not None:
            writer.put("mamba_norm_before_gate", value == "norm_first", setting)


class InnerWidth(Rule):
    """The width inside the state space, which must be that of its heads together."""

    def read(self, reader: ConfigReader) -> None:
        inner, width = reader.get(INNER), reader.integer(HEADS, 128) * reader.integer(SIZE)
        if inner != width:
            reader.problem(f"{INNER} must be {HEADS} * {SIZE} = {width}; got {inner!r}")

    def write(self, writer: ConfigWriter) -> None:
        writer.config[INNER] = writer.config.get(HEADS, 0) * writer.config.get(SIZE, 0)


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The width inside may be null, for `mamba_expand` times the width, and the size of heads in it "auto"."""
    new = {INNER: 1024, SIZE: "auto", **config}
    expand, width, heads = new.get("mamba_expand") or 2, new.get("hidden_size"), new.get(HEADS) or 128
    if new[INNER] is None and isinstance(width, int):
        new[INNER] = expand * width
    if new[SIZE] in ("auto", None) and isinstance(new[INNER], int):
        new[SIZE] = new[INNER] // heads
    return new


FAMILY = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    mixers={
        LINEAR: HYBRID_MAMBA2.but(
            head_dim=Integer(SIZE),
            expansion=HeadsTimesSize(HEADS, SIZE, defaults=(128, 64)),
            output_norm=OutputNorm(),
            multipliers=Entries("ssm_multipliers", MULTIPLIED),
        ),
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            bias=Flag("attention_bias"),
            output_bias=Flag("attention_bias"),
            key_multiplier=Number("key_multiplier", 1.0),
        ),
    },
    layers=Every(f"{LINEAR}+{FULL}"),
    side_by_side=Component(
        SideBySide,
        {
            "multipliers": OfMixers({LINEAR: "ssm_out_multiplier", FULL: "attention_out_multiplier"}),
            "input_multipliers": OfMixers({LINEAR: "ssm_in_multiplier", FULL: "attention_in_multiplier"}),
            "norms": Fixed(False),
            "scales": Fixed(False),
            "norm_eps": Unread(),
        },
        {},
    ),
    feed_forwards={
        DENSE: GATED_MLP.moved("mlp.", "feed_forward.").but(
            bias=Flag("mlp_bias"),
            gate_multiplier=Entry("mlp_multipliers", 0, 2),
            down_multiplier=Entry("mlp_multipliers", 1, 2),
        )
    },
    block=BLOCK.but(names={"feed_forward_norm": "pre_ff_layernorm"}),
    model=MODEL.but(
        norm_eps=Number("rms_norm_eps", 1e-5),
        embedding_multiplier=Number("embedding_multiplier", 1.0),
        logit_multiplier=Number("lm_head_multiplier", 1.0),
        names={"norm": "model.final_layernorm"},
    ),
    rules=(
        *RULES,
        InnerWidth(),
        Same("projectors_bias", "mamba_proj_bias", default=False),
        Only("mamba_use_mlp", (True,)),
        Known(("mamba_expand", "mamba_chunk_size", "mamba_norm_before_gate", "mlp_expansion_factor",
               "num_logits_to_keep", "attn_layer_indices", "layer_types", "layers_block_type", "time_step_min",
               "time_step_max", "time_step_floor", "time_step_rank")),
    ),
    current=_current,
)  # fmt: skip
