"""DeepSeek-V3 (arXiv 2412.19437): latent attention, and experts chosen in groups by scores and a bias."""

from ...components import GATED_MLP
from ...family import RULES, Family, renamed
from ...fields import Integer, Number, Product
from ...latent import BIASED_MIXTURE, COMPRESSED, LATENT
from ...layers import DENSE, EXPERTS, ExpertsFrom, WhereNull
from ...rules import Known, Only, Replaced, Same

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    mixers={"mla": LATENT, "compressed": COMPRESSED},
    layers=WhereNull("q_lora_rank", null="mla", given="compressed", absent=1536),
    feed_forwards={
        DENSE: GATED_MLP,
        EXPERTS: BIASED_MIXTURE.but(
            hidden=Integer("moe_intermediate_size", 2048),
            shared_hidden=Product("n_shared_experts", "moe_intermediate_size", default_size=2048),
            experts=Integer("n_routed_experts", 256),
            experts_per_token=Integer("num_experts_per_tok", 8),
            scale=Number("routed_scaling_factor", 2.5),
            groups=Integer("n_group", 8),
            chosen_groups=Integer("topk_group", 4),
        ),
    },
    feed_forward_layers=ExpertsFrom("first_k_dense_replace", absent=3),
    rules=(
        *RULES,
        Same("num_key_value_heads", "num_attention_heads"),
        Only("rope_interleave", (True,)),
        Only("scoring_func", ("sigmoid",)),
        Only("topk_method", ("noaux_tc",)),
        Only("moe_layer_freq", (1,)),
        Replaced("num_nextn_predict_layers", 0),
        Known(("head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size", "auto_map")),
    ),
    predicts=True,
    current=renamed(num_mtp_layers="num_nextn_predict_layers", num_local_experts="n_routed_experts"),
)
