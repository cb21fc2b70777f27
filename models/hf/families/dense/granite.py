"""Granite 3 (IBM, 2024): a Llama with multipliers of embeddings, attention's logits, residual paths and logits."""

from ....block import ScaledBlock
from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL, scale_written
from ...family import Family
from ...fields import Flag, Inverse, Number
from ...layers import DENSE, FULL

ATTENTION_BY_MULTIPLIER = scale_written(ATTENTION).but(
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
    scale=Number("attention_multiplier", 1.0),
)
BLOCK_BY_MULTIPLIER = BLOCK.but(target=ScaledBlock, multiplier=Number("residual_multiplier", 1.0))
MODEL_BY_MULTIPLIERS = MODEL.but(
    embedding_multiplier=Number("embedding_multiplier", 1.0), logit_multiplier=Inverse("logits_scaling")
)

FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    mixers={FULL: ATTENTION_BY_MULTIPLIER},
    feed_forwards={DENSE: GATED_MLP.but(bias=Flag("mlp_bias"))},
    block=BLOCK_BY_MULTIPLIER,
    model=MODEL_BY_MULTIPLIERS,
)
