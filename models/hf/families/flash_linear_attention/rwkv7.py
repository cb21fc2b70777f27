"""RWKV-7 (Peng et al., 2025, arXiv 2503.14456): its time mixing and its channel mixing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....feed_forward.rwkv import RWKVChannelMixing
from ....mixers.delta.rwkv7 import MIXES, RWKV7, rank
from ...components import Component
from ...config import ConfigReader, ConfigWriter
from ...fields import Field, Fixed, Flag, Integer, Number
from ...flash_linear_attention import FLA_BLOCK, FLA_MODEL, Hidden, PerHead, flash_linear_attention, projections
from ...layers import DENSE
from ...rules import Absent, Known, Only, Rule
from ...tensors import Weight


class HeadDim(PerHead):
    """`head_dim`; where it is null, what the heads leave it."""

    def read(self, reader: ConfigReader) -> int:
        return super().read(reader) if reader.get("head_dim") is None else reader.integer("head_dim")

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("head_dim", value, setting)


class KeyEps(Field):
    """1e-6 in fused norms, 0 in others."""

    def read(self, reader: ConfigReader) -> float:
        return 1e-6 if reader.flag("fuse_norm", default=True) else 0.0

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value in (0.0, 1e-6):
            writer.put("fuse_norm", value > 0, setting)
        else:
            writer.refuse(setting, value, ", which must be 1e-6 or 0")


class NormBias(Field):
    """`norm_bias`: whether layer norms have a bias."""

    def read(self, reader: ConfigReader) -> str:
        return "layer" if reader.flag("norm_bias", default=True) else "unbiased_layer"

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value not in ("layer", "unbiased_layer"):
            writer.refuse(setting, value)
        writer.put("norm_bias", value == "layer", setting)


class Square(Rule):
    """`value_dim`, a size or one per layer, must be that of the model."""

    def read(self, reader: ConfigReader) -> None:
        width, value = reader.integer("hidden_size"), reader.get("value_dim")
        if any(size not in (None, width) for size in (value if isinstance(value, list) else [value])):
            reader.problem(f"value_dim must be hidden_size = {width}; got {value!r}")

    def write(self, writer: ConfigWriter) -> None:
        writer.config["value_dim"] = None


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    ranks = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
    by_rule = {name: rank(arguments["width"], factor) for name, factor in ranks.items() if arguments[name] is None}
    return {**arguments, **by_rule}


def _row(theirs: Tensor) -> Tensor:
    return theirs.view(1, -1)


LOW_RANKS = {"decay": "w", "rate": "a", "value_mix": "v", "gate": "g"}
MIXER = Component(
    RWKV7,
    {
        "head_dim": HeadDim("num_heads"),
        "decay_rank": Integer("decay_low_rank_dim"),
        "rate_rank": Integer("a_low_rank_dim"),
        "value_rank": Integer("v_low_rank_dim"),
        "gate_rank": Integer("gate_low_rank_dim"),
        "head_norm_eps": Number("norm_eps", 1e-5),
        "key_eps": KeyEps(),
    },
    {
        **projections(receptance="r", key="k", value="v", output="o"),
        **{f"{name}.down": f"attn.{letter}_lora.lora.0" for name, letter in LOW_RANKS.items()},
        **{f"{name}.up": f"attn.{letter}_lora.lora.2" for name, letter in LOW_RANKS.items()},
        "mix": Weight("attn.x_{}", tuple(MIXES), read=_row, write=lambda ours: ours.view(1, 1, -1)),
        "removal_key": "attn.k_k",
        "replacement_key": "attn.k_a",
        "bonus": "attn.r_k",
        "norm": "attn.g_norm",
    },
    _resolve,
)
FAMILY = flash_linear_attention(
    "rwkv7",
    "RWKV7ForCausalLM",
    MIXER,
    alone=True,
    feed_forwards={
        DENSE: Component(
            RWKVChannelMixing,
            {"hidden": Hidden(part=(1, 1), multiple=32), "receptance": Fixed(False)},
            {
                "mix": Weight("ffn.x_k", read=_row, write=torch.flatten),
                "up": "ffn.key",
                "down": "ffn.value",
            },
        )
    },
    block=FLA_BLOCK.but(names={"feed_forward_norm": "ffn_norm"}),
    model=FLA_MODEL.but(
        norm_eps=Number("norm_eps", 1e-5),
        norm=NormBias(),
        embedding_norm=Flag("norm_first", default=True),
        names={"embedding_norm": "model.layers.0.pre_norm"},
    ),
    defaults={
        "head_dim": 64,
        "decay_low_rank_dim": 64,
        "gate_low_rank_dim": 128,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 16,
    },
    rules=(
        Only("hidden_act", ("sqrelu",)),
        Square(),
        Absent("attn", "flash-linear-attention itself cannot run attention in some layers of this model"),
        Known(("num_heads",)),
    ),
)
