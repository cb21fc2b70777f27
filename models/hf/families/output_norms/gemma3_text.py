"""Gemma 3's language model (arXiv 2503.19786): norms around each part, windows in 5 of 6 layers, two RoPE bases."""

from ....block import SandwichBlock
from ....feed_forward.geglu import GEGLU
from ...components import BLOCK, GATED_MLP, HEAD_NORMED_ATTENTION, MODEL, scale_written
from ...family import Family
from ...fields import Fixed, Flag, Integer, InverseRoot, Root
from ...layers import DENSE, FULL, WINDOW, LayerTypes, every_nth_full
from ...optional import OptionalNumber
from ...rope import RopeBase, RopeByLayerType, RopeScale
from ...rules import Absent, Known, Only

attention = scale_written(HEAD_NORMED_ATTENTION).but(
    heads=Integer("num_attention_heads", 8),
    kv_heads=Integer("num_key_value_heads", 4, divides="num_attention_heads"),
    head_dim=Integer("head_dim", 256),
    norm_offset=Fixed(1.0),
    scale=InverseRoot("query_pre_attn_scalar", 256),
    rope_base=RopeBase(1e6, layer_type="full_attention"),
    rope_scaling=RopeScale(layer_type="full_attention"),
)

FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    within=("gemma3",),
    mixers={
        FULL: attention,
        WINDOW: attention.but(
            window=Integer("sliding_window", absent=4096),
            rope_base=RopeBase(1e4, key="rope_local_base_freq", layer_type="sliding_attention"),
            rope_scaling=RopeScale(layer_type="sliding_attention", local=True),
        ),
    },
    layers=LayerTypes(every_nth_full(6, "sliding_window_pattern")),
    feed_forwards={DENSE: GATED_MLP.but(target=GEGLU, approximate=Fixed("tanh"))},
    block=BLOCK.but(
        target=SandwichBlock,
        names={
            "mixer_output_norm": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "feed_forward_output_norm": "post_feedforward_layernorm",
        },
    ),
    model=MODEL.but(
        vocabulary=Integer("vocab_size", 262208),
        norm=Fixed("zero_centred_rms"),
        embedding_multiplier=Root("hidden_size"),
        logit_softcap=OptionalNumber("final_logit_softcapping"),
        tied_embeddings=Flag("tie_word_embeddings", default=True),
    ),
    rules=(
        RopeByLayerType(base="rope_local_base_freq"),
        Only("hidden_activation", ("gelu_pytorch_tanh",)),
        Only("attention_dropout", (0.0, 0)),
        Absent("attn_logit_softcapping", "transformers computes this family without it"),
        Absent("use_bidirectional_attention", "Language models see no later token"),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("sliding_window_pattern", "_sliding_window_pattern", "cache_implementation")),
    ),
)
