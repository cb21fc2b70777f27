"""GLM-4.5 (arXiv 2508.06471): grouped attention whose heads turn by half, DeepSeek-V3's experts after dense layers."""

from ...components import ATTENTION, GATED_MLP, MODEL
from ...family import RULES, Family, renamed
from ...fields import Flag, Integer, Number, Product, Unread
from ...latent import BIASED_MIXTURE
from ...layers import DENSE, EXPERTS, FULL, ExpertsFrom
from ...optional import Switch
from ...rope import RopeBase, RopePart, RopeScale
from ...rules import Known, Replaced

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            bias=Flag("attention_bias"),
            qk_norm=Switch("use_qk_norm", "head", default=False),
            norm_eps=Unread("rms_norm_eps"),
            rope_base=RopeBase(partial=True),
            rope_fraction=RopePart(0.5),
            rope_scaling=RopeScale(partial=True),
            names={"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
        )
    },
    feed_forwards={
        DENSE: GATED_MLP,
        EXPERTS: BIASED_MIXTURE.but(
            hidden=Integer("moe_intermediate_size", 1408),
            shared_hidden=Product("n_shared_experts", "moe_intermediate_size", default_size=1408),
            experts=Integer("n_routed_experts", 128),
            experts_per_token=Integer("num_experts_per_tok", 8),
        ),
    },
    feed_forward_layers=ExpertsFrom("first_k_dense_replace", absent=1),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(*RULES, Replaced("num_nextn_predict_layers", 0), Known(("use_qk_norm",))),
    yields_to=("llama", "qwen2", "qwen3"),
    predicts=True,
    current=renamed(num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"),
)
