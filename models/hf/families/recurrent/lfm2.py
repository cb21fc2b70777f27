"""LFM2 (Liquid AI, 2025, arXiv 2511.23404): gated short convolutions, and attention in some layers."""

from collections.abc import Mapping
from typing import Any

from ....mixers.elementwise.gated_short_convolution import GatedShortConvolution
from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL, Component
from ...config import ConfigReader, ConfigWriter
from ...family import Family
from ...fields import Field, Fixed, Flag, Integer, Number, Unread
from ...layers import DENSE, FULL, LayerTypes
from ...rope import RopeBase
from ...rules import Absent, Known
from ...tensors import Weight, convolution, rows_of

CONVOLUTION = "conv"


class Adjusted(Field):
    """`intermediate_size`, of which two thirds count, rounded up to a multiple, where a key says so."""

    def read(self, reader: ConfigReader) -> int:
        size = reader.integer("intermediate_size", 12288)
        multiplier, multiple = reader.get("block_ffn_dim_multiplier", 1.0), reader.integer("block_multiple_of", 256)
        if not reader.flag("block_auto_adjust_ff_dim", default=True):
            return size
        size = int(2 * size / 3)
        if multiplier is None:
            return size
        return multiple * -(-int(reader.positive("block_ffn_dim_multiplier", multiplier) * size) // multiple)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("intermediate_size", value, setting)
        writer.put("block_auto_adjust_ff_dim", False, setting)


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Two keys have had other names, which win."""
    new = dict(config)
    for old, name in (("tie_embedding", "tie_word_embeddings"), ("block_ff_dim", "intermediate_size")):
        if (value := new.pop(old, None)) is not None:
            new[name] = value
    return new


def _listed(reader: ConfigReader, depth: int) -> list[str]:
    full = reader.get("full_attn_idxs")
    return [FULL if full is None or layer in full else CONVOLUTION for layer in range(depth)]


def _input(number: int) -> Weight:
    """Of B, C and the values, one."""
    return Weight("conv.in_proj", rows=lambda mixer: rows_of(number, [mixer.value.out_features] * 3))


FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            qk_norm=Fixed("head"),
            norm_eps=Unread("norm_eps"),
            rope_base=RopeBase(1e6),
            names={
                "query_norm": "self_attn.q_layernorm",
                "key_norm": "self_attn.k_layernorm",
                "output": "self_attn.out_proj",
            },
        ),
        CONVOLUTION: Component(
            GatedShortConvolution,
            {"conv_size": Integer("conv_L_cache", 3), "bias": Flag("conv_bias")},
            {
                **{name: _input(number) for number, name in enumerate(("input_gate", "output_gate", "value"))},
                "conv.weight": convolution("conv.conv.weight"),
                "conv.bias": "conv.conv.bias",
                "output": "conv.out_proj",
            },
        ),
    },
    layers=LayerTypes(_listed, {"full_attention": FULL, "conv": CONVOLUTION}),
    feed_forwards={
        DENSE: GATED_MLP.but(
            hidden=Adjusted(), names={"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"}
        )
    },
    block=BLOCK.but(
        norm_eps=Unread("norm_eps"), names={"mixer_norm": "operator_norm", "feed_forward_norm": "ffn_norm"}
    ),
    model=MODEL.but(
        norm_eps=Number("norm_eps", 1e-5),
        tied_embeddings=Flag("tie_word_embeddings", default=True),
        names={"norm": "model.embedding_norm"},
    ),
    rules=(
        Absent("quantization_config", "Save the model dequantised"),
        Known(
            ("full_attn_idxs", "block_ffn_dim_multiplier", "block_multiple_of", "block_dim", "block_mlp_init_scale",
             "block_norm_eps", "block_out_init_scale", "block_use_swiglu", "block_use_xavier_init", "conv_dim",
             "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc")
        ),
    ),
    yields_to=("qwen3",),
    current=_current,
)  # fmt: skip
