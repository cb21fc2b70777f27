"""DeltaNet (Yang et al., 2024, arXiv 2406.06484)."""

from ...flash_linear_attention import DELTA, SWISH, flash_linear_attention
from ...rules import Known, Only

FAMILY = flash_linear_attention(
    "delta_net",
    "DeltaNetForCausalLM",
    DELTA,
    defaults={"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "use_short_conv": True},
    rules=(
        SWISH,
        Only("use_beta", (True,)),
        Only("qk_norm", ("l2",)),
        Only("qk_activation", ("silu",)),
        Known(("use_output_norm",)),
    ),
)
