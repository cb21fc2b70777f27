"""xLSTM 7B (arXiv 2503.13427): mLSTM with capped gates, a feed-forward layer in every block, capped logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....mixers.linear.mlstm import MLSTM
from ...components import BLOCK, GATED_MLP, MODEL, Component
from ...config import ConfigReader, ConfigWriter
from ...family import Family
from ...fields import Field, Fixed, Integer, Key, Number, Unread
from ...layers import LINEAR, Every
from ...rules import Absent, Known, Only, Same
from ...state_space import expansion_of


@dataclass(frozen=True)
class OfWidth(Key):
    """A head's size, by the part of the width that all heads together have."""

    default: float

    def read(self, reader: ConfigReader) -> int:
        together, heads = int(reader.integer("hidden_size") * reader.number(self.key, self.default)), _heads(reader)
        if together % heads:
            reader.problem(f"num_heads must divide {self.key} * hidden_size = {together}; got {heads}")
        return max(1, together // heads)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if (width := writer.config.get("hidden_size")) is not None:
            writer.put(self.key, float(expansion_of(value * writer.config["num_heads"], width)), setting)


class RoundedUp(Field):
    """`ffn_proj_factor` times the width, rounded up to a multiple of `ffn_round_up_to_multiple_of`."""

    def read(self, reader: ConfigReader) -> int:
        multiple = reader.integer("ffn_round_up_to_multiple_of", 64)
        hidden = reader.integer("hidden_size") * reader.number("ffn_proj_factor", 2.667)
        return int((hidden + multiple - 1) // multiple * multiple)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if (width := writer.config.get("hidden_size")) is not None:
            writer.put("ffn_proj_factor", float(expansion_of(value, width)), setting)
        writer.put("ffn_round_up_to_multiple_of", 1, setting)


def _heads(reader: ConfigReader) -> int:
    return reader.integer("num_heads", 8)


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Two keys have another name too, which counts where they are null."""
    new = dict(config)
    for key, other in (("hidden_size", "embedding_dim"), ("num_hidden_layers", "num_blocks")):
        if new.get(key) is None and new.get(other) is not None:
            new[key] = new[other]
    return new


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    width, heads = arguments["width"], arguments["heads"]
    sizes = {"key_dim": width // (2 * heads), "value_dim": width // heads}
    return {**arguments, **{name: size for name, size in sizes.items() if arguments[name] is None}}


FAMILY = Family(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    mixers={
        LINEAR: Component(
            MLSTM,
            {
                "heads": Integer("num_heads", 8),
                "key_dim": OfWidth("qk_dim_factor", 0.5),
                "value_dim": OfWidth("v_dim_factor", 1.0),
                "gate_cap": Number("gate_soft_cap", 15.0),
                "norm_eps": Unread("norm_eps"),
            },
            {
                "query": "mlstm_layer.q",
                "key": "mlstm_layer.k",
                "value": "mlstm_layer.v",
                "input_gate": "mlstm_layer.igate_preact",
                "forget_gate": "mlstm_layer.fgate_preact",
                "gate": "mlstm_layer.ogate_preact",
                "norm": "mlstm_layer.multihead_norm",
                "output": "mlstm_layer.out_proj",
            },
            _resolve,
        )
    },
    layers=Every(LINEAR),
    feed_forwards={
        "gated": GATED_MLP.but(
            hidden=RoundedUp(), names={"gate": "ffn.proj_up_gate", "up": "ffn.proj_up", "down": "ffn.proj_down"}
        )
    },
    feed_forward_layers=Every("gated"),
    block=BLOCK.but(norm_eps=Unread("norm_eps"), names={"mixer_norm": "norm_mlstm", "feed_forward_norm": "norm_ffn"}),
    model=MODEL.but(
        norm_eps=Number("norm_eps", 1e-6),
        logit_softcap=Number("output_logit_soft_cap", 30.0),
        tied_embeddings=Fixed(False),
        names={"embedding": "backbone.embeddings", "norm": "backbone.out_norm"},
    ),
    rules=(
        Same("embedding_dim", "hidden_size"),
        Same("num_blocks", "num_hidden_layers"),
        Only("tie_word_embeddings", (False,)),
        Only("use_bias", (False,)),
        Only("add_out_norm", (True,)),
        Only("weight_mode", ("single",)),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("eps", "norm_reduction_force_float32", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode",
               "chunk_size", "return_last_states", "autocast_kernel_dtype", "inference_state_dtype",
               "max_inference_chunksize")),
    ),
    prefix="backbone.blocks.{layer}.",
    current=_current,
)  # fmt: skip
