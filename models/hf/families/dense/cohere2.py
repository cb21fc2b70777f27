"""Cohere2, Command A and R7B (arXiv 2504.00698): parallel blocks, layer norms, layers with windows or no positions."""

from ....block import ParallelBlock
from ...components import ATTENTION, BLOCK, INTERLEAVED, MODEL
from ...family import Family
from ...fields import Fixed, Flag, Integer, Number, Unread
from ...layers import FULL, WINDOW, LayerTypes, every_nth_full
from ...rules import Absent, Known, Only

attention = ATTENTION.but(
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
)

FAMILY = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    mixers={
        FULL: attention.but(rope_base=Fixed(None), rope_scaling=Fixed(None)),
        WINDOW: attention.but(
            window=Integer("sliding_window", absent=4096),
            names=INTERLEAVED,
        ),
    },
    layers=LayerTypes(every_nth_full(4, "sliding_window_pattern")),
    block=BLOCK.but(target=ParallelBlock, norm_eps=Unread("layer_norm_eps"), names={"norm": "input_layernorm"}),
    model=MODEL.but(
        norm=Fixed("unbiased_layer"),
        norm_eps=Number("layer_norm_eps", 1e-5),
        logit_multiplier=Number("logit_scale", 0.0625),
        tied_embeddings=Flag("tie_word_embeddings", default=True),
    ),
    rules=(
        Only("hidden_act", ("silu", "swish")),
        Only("attention_dropout", (0.0, 0)),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("sliding_window_pattern", "_sliding_window_pattern", "cache_implementation")),
        Absent("use_qk_norm", "Queries and keys have no norm in this family"),
    ),
)
