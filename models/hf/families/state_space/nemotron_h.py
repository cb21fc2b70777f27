"""Nemotron-H and Nemotron 3 (arXiv 2504.03624): Mamba-2, attention without positions, MLPs and experts, one a layer."""

from collections.abc import Mapping
from typing import Any

from ....feed_forward.mlp import MLP
from ...components import ATTENTION, Component
from ...family import Family
from ...fields import Fixed, Flag, Integer
from ...latent import BIASED_MIXTURE
from ...layers import DENSE, EXPERTS, FULL, LINEAR, LayerTypes
from ...optional import Never, OptionalInteger
from ...rules import Absent, Known, Only, Replaced
from ...state_space import MAMBA2, STATE_SPACE_BLOCK, STATE_SPACE_MODEL, STATE_SPACE_RULES, HeadsTimesSize

KINDS = {"linear_attention": LINEAR, "full_attention": FULL, "mlp": DENSE, "moe": EXPERTS}
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # of layers, in older versions
OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_limit": "time_step_limit", "mamba_conv_bias": "use_conv_bias", "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
}  # fmt: skip


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first versions have a letter for each layer; later ones leave out how many there are."""
    new = {OLDER.get(key, key): value for key, value in config.items()}
    letters = new.pop("hybrid_override_pattern", None)
    if new.get("layers_block_type") is None and isinstance(letters, str):
        new["layers_block_type"] = [LETTERS.get(letter, letter) for letter in letters]
    if isinstance(new.get("layers_block_type"), list):
        new["layers_block_type"] = [NAMES.get(name, name) for name in new["layers_block_type"]]
        new["num_hidden_layers"] = len(new["layers_block_type"])
    return new


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    mixers={
        FULL: ATTENTION.moved("self_attn.", "mixer.").but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            head_dim=Integer("head_dim", 128),
            rope_base=Fixed(None),
            rope_scaling=Fixed(None),
        ),
        LINEAR: MAMBA2.but(
            head_dim=Integer("mamba_head_dim", 64),
            expansion=HeadsTimesSize("mamba_num_heads", "mamba_head_dim", defaults=(128, 64)),
            state=Integer("ssm_state_size", 128),
        ),
        DENSE: Component(
            MLP,
            {
                "hidden": Integer("intermediate_size", 21504),
                "activation": Fixed("squared_relu"),
                "bias": Flag("mlp_bias"),
            },
            {"up": "mixer.up_proj", "down": "mixer.down_proj"},
        ),
        EXPERTS: BIASED_MIXTURE.moved("mlp.", "mixer.").but(
            hidden=Integer("moe_intermediate_size", 7688),
            experts=Integer("n_routed_experts", 8),
            experts_per_token=Integer("num_experts_per_tok", 2),
            shared_hidden=Integer("moe_shared_expert_intermediate_size", 7688),
            activation=Fixed("squared_relu"),
            expert_width=OptionalInteger("moe_latent_size"),
            bias=Never("mlp_bias", "Experts here have no biases"),
            names={"narrow": "mixer.fc1_latent_proj", "widen": "mixer.fc2_latent_proj"},
        ),
    },
    layers=LayerTypes(kinds=KINDS, key="layers_block_type"),
    feed_forwards={},
    block=STATE_SPACE_BLOCK,
    model=STATE_SPACE_MODEL.but(tied_embeddings=Fixed(False)),
    rules=(
        *STATE_SPACE_RULES,
        Replaced("tie_word_embeddings", False),  # transformers' class never ties them
        Only("mlp_hidden_act", ("relu2",)),
        Only("mamba_hidden_act", ("silu",)),
        Only("attention_dropout", (0.0, 0)),
        Absent("attention_bias", "transformers' attention of this family has no biases"),
        Absent("sliding_window", "Attention has no window in this family"),
        Replaced("num_nextn_predict_layers", 0),
        Known(("mamba_proj_bias", "expand", "intermediate_size", "use_mamba_kernels", "mamba_ssm_cache_dtype",
               "hidden_dropout", "num_logits_to_keep", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
               "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
               "moe_latent_size", "moe_shared_expert_overlap", "num_experts_per_tok", "routed_scaling_factor",
               "n_group", "topk_group", "norm_topk_prob", "attention_head_dim", "use_bias")),
    ),
    yields_to=("mamba2",),
    ignored=(r"^mtp\.",),
    prefix="backbone.layers.{layer}.",
    current=_current,
)  # fmt: skip
