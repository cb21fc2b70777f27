"""GSA (Zhang et al., 2024, arXiv 2409.07146): gated slot attention."""

from dataclasses import dataclass

from ....mixers.linear.gated_slot_attention import GatedSlotAttention
from ...components import Component
from ...config import ConfigReader
from ...fields import Fixed, Integer, Number
from ...flash_linear_attention import (
    AFFINE,
    SWISH,
    Expanded,
    PerHead,
    Taps,
    flash_linear_attention,
    projections,
    short_convolution,
    with_sizes,
)
from ...rules import Known, Only

KEY_DIM = Expanded("expand_k")


@dataclass(frozen=True)
class Slots(Integer):
    """As many as a head's keys have dims where the key is null."""

    def read(self, reader: ConfigReader) -> int:
        return KEY_DIM.read(reader) if reader.get(self.key) is None else reader.integer(self.key)


FAMILY = flash_linear_attention(
    "gsa",
    "GSAForCausalLM",
    Component(
        GatedSlotAttention,
        {
            "heads": Integer("num_heads"),
            "kv_heads": Integer("num_kv_heads", "num_heads", divides="num_heads"),
            "key_dim": KEY_DIM,
            "value_dim": PerHead("num_heads"),
            "slots": Slots("num_slots"),
            "gate_normaliser": Number("gate_logit_normalizer", 8.0),
            "conv_size": Taps(),
            "norm_eps": Fixed(1e-5),  # whatever that of the model
        },
        {
            **projections(query="q", key="k", value="v", forget="f", output="o"),
            "conv.weight": short_convolution(),
            "norm": "attn.g_norm",
        },
        with_sizes(),
    ),
    defaults={"num_heads": 4, "num_slots": 64, "expand_k": 1.0, "expand_v": 1.0},
    rules=(
        SWISH,
        AFFINE,
        Only("expand_v", (1.0,)),  # the norm has as many channels as the model
        Only("feature_map", ("swish",)),
        Known(("clamp_min", "clamp_max", "use_output_gate", "use_norm")),  # its layers do not look at them
    ),
    rename={"exapnd_k": "expand_k", "exapnd_v": "expand_v"},
)
