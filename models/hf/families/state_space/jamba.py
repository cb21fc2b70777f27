"""Jamba (arXiv 2403.19887): Mamba with normed parts, attention without positions in some layers, experts in some."""

from ...components import ATTENTION, BLOCK, GATED_MLP, MIXTURE, MODEL
from ...family import RULES, Family, renamed
from ...fields import Fixed, Flag, Integer, Unread
from ...layers import DENSE, EXPERTS, FULL, LINEAR, Periodic
from ...rules import Known
from ...state_space import MAMBA, StepRank

FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            rope_base=Fixed(None),
            rope_scaling=Fixed(None),
        ),
        LINEAR: MAMBA.moved("mixer.", "mamba.").but(
            expansion=Integer("mamba_expand", 2),
            state=Integer("mamba_d_state", 16),
            step_rank=StepRank("mamba_dt_rank"),
            conv_size=Integer("mamba_d_conv", 4),
            bias=Flag("mamba_proj_bias"),
            conv_bias=Flag("mamba_conv_bias", default=True),
            part_norms=Fixed("weighted"),
            norm_eps=Unread("rms_norm_eps"),
            names={"norms.0": "mamba.dt_layernorm", "norms.1": "mamba.b_layernorm", "norms.2": "mamba.c_layernorm"},
        ),
    },
    layers=Periodic("attn_layer_period", "attn_layer_offset", FULL, LINEAR, defaults=(8, 4)),
    feed_forwards={
        DENSE: GATED_MLP.moved("mlp.", "feed_forward."),
        EXPERTS: MIXTURE.moved("mlp.", "feed_forward.").but(
            experts=Integer("num_experts", 16),
            experts_per_token=Integer("num_experts_per_tok", 2),
            renormalise=Fixed(False),
            names={"router.weight": "feed_forward.router.weight"},
        ),
    },
    feed_forward_layers=Periodic(
        "expert_layer_period", "expert_layer_offset", EXPERTS, DENSE, defaults=(2, 1), count="num_experts"
    ),
    block=BLOCK.but(names={"feed_forward_norm": "pre_ff_layernorm"}),
    model=MODEL.but(names={"norm": "model.final_layernorm"}),
    rules=(*RULES, Known(("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep",
                          "mamba_inner_layernorms", "layer_types", "layers_block_type"))),
    current=renamed(num_local_experts="num_experts"),
)  # fmt: skip
