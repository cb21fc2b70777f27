"""GLM-4 (arXiv 2406.12793): half of a head's dims turn, as neighbouring pairs; fused feed-forward layers."""

from ...components import ATTENTION, FUSED_GATED_MLP, INTERLEAVED, MODEL
from ...family import Family
from ...fields import Flag, Integer, Number
from ...layers import DENSE, FULL
from ...rope import RopeBase, RopePart, RopeScale

FAMILY = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=2, divides="num_attention_heads"),
            head_dim=Integer("head_dim", absent=128),
            rope_base=RopeBase(partial=True),
            rope_fraction=RopePart(0.5),
            rope_scaling=RopeScale(partial=True),
            bias=Flag("attention_bias", default=True),
            names=INTERLEAVED,
        )
    },
    feed_forwards={DENSE: FUSED_GATED_MLP},
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1.5625e-7)),
    yields_to=("llama", "qwen2"),
)
