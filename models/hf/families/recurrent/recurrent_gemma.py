"""RecurrentGemma (arXiv 2404.07839): RG-LRU, attention in a window in every third layer, GEGLU, capped logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....feed_forward.geglu import GEGLU
from ....mixers.elementwise.rg_lru import RGLRU
from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL, Component
from ...config import ConfigReader, ConfigWriter
from ...family import Family, renamed
from ...fields import Fixed, Flag, Integer, Key, Number, Root
from ...layers import DENSE, LINEAR, WINDOW, Tiled
from ...rope import RopeBase, RopePart, RopeScale
from ...rules import Absent, Known, Only
from ...tensors import Weight, convolution


@dataclass(frozen=True)
class Half(Key):
    """Half of a positive integer, rounded down; `default` of it where the key is absent or null."""

    default: int

    def read(self, reader: ConfigReader) -> int:
        return reader.integer(self.key, self.default) // 2

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put(self.key, 2 * value, setting)


def _transposed(weight: Tensor) -> Tensor:
    """Of the matrix of each block."""
    return weight.transpose(1, 2)


def _gate(name: str) -> dict[str, Weight]:
    """A gate's matrices and its bias by our names, without the part's own."""
    return {
        "gate.weight": Weight(f"temporal_block.rg_lru.{name}_gate_weight", read=_transposed, write=_transposed),
        "bias": Weight(
            f"temporal_block.rg_lru.{name}_gate_bias",
            read=torch.flatten,
            shape=lambda mixer: (mixer.input_gate.weight.shape[0], -1),
        ),
    }


RECURRENT = Component(
    RGLRU,
    {
        "blocks": Integer("num_attention_heads", 10),
        "inner": Integer("lru_width", "hidden_size"),
        "conv_size": Integer("conv1d_width", 4),
    },
    {
        **{f"recurrence_{name}": weight for name, weight in _gate("recurrent").items()},
        **{f"input_{name}": weight for name, weight in _gate("input").items()},
        "Lambda": "temporal_block.rg_lru.recurrent_param",
        "value": "temporal_block.linear_x",
        "gate": "temporal_block.linear_y",
        "conv.weight": convolution("temporal_block.conv_1d.weight"),
        "conv.bias": "temporal_block.conv_1d.bias",
        "output": "temporal_block.linear_out",
    },
    lambda arguments: {**arguments, "inner": arguments["inner"] or arguments["width"]},
)

FAMILY = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    mixers={
        LINEAR: RECURRENT,
        WINDOW: ATTENTION.moved("self_attn.", "temporal_block.").but(
            heads=Integer("num_attention_heads", 10),
            window=Integer("attention_window_size", 2048),
            bias=Flag("attention_bias"),
            output_bias=Fixed(True),
            rope_base=RopeBase(partial=True),
            rope_fraction=RopePart(0.5),
            rope_scaling=RopeScale(partial=True, kinds=()),
        ),
    },
    layers=Tiled(
        "block_types", {"recurrent": LINEAR, "attention": WINDOW}, default=("recurrent", "recurrent", "attention")
    ),
    feed_forwards={
        DENSE: GATED_MLP.moved("mlp.", "mlp_block.").but(
            target=GEGLU, hidden=Half("intermediate_size", 7680), bias=Fixed(True), approximate=Fixed("tanh")
        )
    },
    block=BLOCK.but(names={"mixer_norm": "temporal_pre_norm", "feed_forward_norm": "channel_pre_norm"}),
    model=MODEL.but(
        norm=Fixed("zero_centred_rms"),
        embedding_multiplier=Root("hidden_size", torch.bfloat16),
        logit_softcap=Number("logits_soft_cap", 30.0),
        tied_embeddings=Flag("tie_word_embeddings", default=True),
        names={"norm": "model.final_norm"},
    ),
    rules=(
        Only("hidden_activation", ("gelu_pytorch_tanh",)),
        Only("attention_dropout", (0.0, 0)),
        Only("embeddings_scale_by_sqrt_dim", (True,)),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("w_init_variance_scale", "final_w_init_variance_scale", "layer_types", "layers_block_type")),
    ),
    current=renamed(sliding_window="attention_window_size"),
)
