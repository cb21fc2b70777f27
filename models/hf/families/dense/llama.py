"""Llama (arXiv 2302.13971, 2407.21783): grouped heads, rotary positions, biases by keys."""

from ...components import ATTENTION, GATED_MLP
from ...family import Family
from ...fields import Flag, Integer
from ...layers import DENSE, FULL

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            heads=Integer("num_attention_heads", divides="hidden_size", unless="head_dim"),
            bias=Flag("attention_bias"),
            output_bias=Flag("attention_bias"),
        ),
    },
    feed_forwards={DENSE: GATED_MLP.but(bias=Flag("mlp_bias"))},
)
