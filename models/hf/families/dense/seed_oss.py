"""Seed-OSS (ByteDance, 2025): a Llama for rows of 512K tokens, with biases of queries, keys and values."""

from ...components import ATTENTION, GATED_MLP
from ...family import RULES, Family
from ...fields import Flag, Integer
from ...layers import DENSE, FULL
from ...rules import Only, Replaced

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            head_dim=Integer("head_dim", absent=128),
            bias=Flag("attention_bias", default=True),
            output_bias=Flag("attention_out_bias"),
        )
    },
    feed_forwards={DENSE: GATED_MLP.but(bias=Flag("mlp_bias"))},
    # The published model says that it was trained with dropout; training goes on without.
    rules=(
        *(rule for rule in RULES if rule != Only("attention_dropout", (0.0, 0))),
        Replaced("attention_dropout", 0.0),
        Replaced("residual_dropout", 0.0),
    ),
    yields_to=("llama", "qwen2"),
)
