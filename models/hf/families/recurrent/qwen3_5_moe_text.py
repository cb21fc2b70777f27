"""Qwen3.5's language model with experts (Qwen team, 2026), which checkpoints hold one by one or stacked."""

from dataclasses import replace

from ...fields import Fixed, Integer
from ...layers import EXPERTS, FULL, LINEAR, Every
from ...tensors import Weight, of_experts
from .qwen3_5_text import FAMILY as QWEN3_5
from .qwen3_next import GATED_ATTENTION, SHARING_MIXTURE

experts = SHARING_MIXTURE.but(
    experts=Integer("num_experts", 256),
    experts_per_token=Integer("num_experts_per_tok", 8),
    renormalise=Fixed(True),
)
single = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    within=("qwen3_5_moe",),
    mixers={FULL: GATED_ATTENTION, LINEAR: QWEN3_5.mixers[LINEAR]},
    feed_forwards={EXPERTS: experts},
    feed_forward_layers=Every(EXPERTS),
    yields_to=("qwen3_next",),
)
stacked = experts.but(
    names={
        "experts.gate.weight": Weight("mlp.experts.gate_up_proj", rows=of_experts(0), dim=1),
        "experts.up.weight": Weight("mlp.experts.gate_up_proj", rows=of_experts(1), dim=1),
        "experts.down.weight": "mlp.experts.down_proj",
    }
)
FAMILY = replace(single, forms=((r"\.mlp\.experts\.gate_up_proj$", replace(single, feed_forwards={EXPERTS: stacked})),))
