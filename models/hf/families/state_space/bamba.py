"""Bamba (IBM, Princeton, CMU and UIUC, 2024): Mamba-2, and in some layers attention whose heads turn by half."""

from ...components import ATTENTION, BLOCK, GATED_MLP, MODEL
from ...family import RULES, Family
from ...fields import Fixed, Flag, Integer, Number
from ...layers import DENSE, FULL, LINEAR, Numbered
from ...rope import RopeBase, RopeScale
from ...rules import Known
from ...state_space import HYBRID_MAMBA2, Heads

FAMILY = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            bias=Flag("attention_bias"),
            output_bias=Flag("attention_bias"),
            rope_base=RopeBase(partial=True),
            rope_fraction=Fixed(0.5),
            rope_scaling=RopeScale(partial=True),
        ),
        LINEAR: HYBRID_MAMBA2,
    },
    layers=Numbered("attn_layer_indices", FULL, LINEAR),
    feed_forwards={DENSE: GATED_MLP.moved("mlp.", "feed_forward.").but(bias=Flag("mlp_bias"))},
    block=BLOCK.but(names={"feed_forward_norm": "pre_ff_layernorm"}),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5), names={"norm": "model.final_layernorm"}),
    rules=(
        *RULES,
        Heads("mamba_n_heads", "mamba_expand", "mamba_d_head", auto=True),
        Known(("mamba_chunk_size", "z_loss_coefficient", "num_logits_to_keep", "partial_rotary_factor",
               "attn_rotary_emb", "layer_types", "layers_block_type")),
    ),
)  # fmt: skip
