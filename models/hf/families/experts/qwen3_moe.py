"""Qwen3-MoE (arXiv 2505.09388): a Qwen3 with experts in most layers, and one window for all layers or none."""

from ...components import GATED_MLP, HEAD_NORMED_ATTENTION, MIXTURE
from ...family import Family, renamed
from ...fields import Flag, Integer
from ...layers import DENSE, EXPERTS, FULL, WINDOW, ExpertsBut, OneWindow

DEFAULT_WINDOW = 4096  # without the key

attention = HEAD_NORMED_ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=4, divides="num_attention_heads"),
)

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=DEFAULT_WINDOW))},
    layers=OneWindow(absent=DEFAULT_WINDOW, switch="use_sliding_window"),
    feed_forwards={
        DENSE: GATED_MLP,
        EXPERTS: MIXTURE.but(
            hidden=Integer("moe_intermediate_size", 768),
            experts=Integer("num_experts", 128),
            experts_per_token=Integer("num_experts_per_tok", 8),
            renormalise=Flag("norm_topk_prob"),
        ),
    },
    feed_forward_layers=ExpertsBut(),
    yields_to=("qwen3",),
    current=renamed(num_local_experts="num_experts"),
)
