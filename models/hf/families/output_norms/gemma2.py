"""Gemma 2 (arXiv 2408.00118): norms around each part, windows in every other layer, capped logits everywhere."""

from dataclasses import replace

from ...components import ATTENTION, scale_written
from ...fields import Flag, Integer, InverseRoot
from ...layers import FULL, WINDOW, LayerTypes, every_nth_full
from ...optional import OptionalNumber
from ...rules import Absent, Known, Only
from .gemma3_text import FAMILY as GEMMA3

attention = scale_written(ATTENTION).but(
    heads=Integer("num_attention_heads", 8),
    kv_heads=Integer("num_key_value_heads", 4, divides="num_attention_heads"),
    head_dim=Integer("head_dim", 256),
    scale=InverseRoot("query_pre_attn_scalar", 256),
    softcap=OptionalNumber("attn_logit_softcapping", absent=50.0),
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
)

FAMILY = replace(
    GEMMA3,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    within=(),
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=4096))},
    layers=LayerTypes(every_nth_full(2)),
    model=GEMMA3.model.but(
        vocabulary=Integer("vocab_size", 256000),
        logit_softcap=OptionalNumber("final_logit_softcapping", absent=30.0),
    ),
    rules=(
        Only("hidden_activation", ("gelu_pytorch_tanh",)),
        Only("attention_dropout", (0.0, 0)),
        Absent("use_bidirectional_attention", "Language models see no later token"),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("hidden_act", "sliding_window_size", "cache_implementation")),
    ),
)
