"""DeepSeek-V2 (arXiv 2405.04434): latent attention, and experts chosen by softmax, of all or of the best groups."""

from collections.abc import Mapping
from typing import Any

from ...components import GATED_MLP, MIXTURE
from ...config import ConfigReader, ConfigWriter
from ...family import RULES, Family
from ...fields import Coefficient, Fixed, Integer, Number, Product
from ...latent import COMPRESSED, LATENT, SHARED
from ...layers import DENSE, EXPERTS, ExpertsFrom, WhereNull
from ...rules import Absent, Known, Only, Rule, Same

METHODS = ("greedy", "group_limited_greedy")


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Groups count only where the method says so."""
    grouped = config.get("topk_method", METHODS[0]) == METHODS[1]
    return config if grouped else {**config, "n_group": 1, "topk_group": 1}


class Method(Rule):
    """`topk_method`, which says whether there are groups."""

    def read(self, reader: ConfigReader) -> None:
        reader.only("topk_method", *METHODS)

    def write(self, writer: ConfigWriter) -> None:
        writer.config["topk_method"] = METHODS[writer.config.get("n_group", 1) > 1]


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    mixers={"mla": LATENT, "compressed": COMPRESSED},
    layers=WhereNull("q_lora_rank", null="mla", given="compressed", absent=1536),
    feed_forwards={
        DENSE: GATED_MLP,
        EXPERTS: MIXTURE.but(
            hidden=Integer("moe_intermediate_size", 1407),
            shared_hidden=Product("n_shared_experts", "moe_intermediate_size", default=2, default_size=1407),
            experts=Integer("n_routed_experts", 64),
            renormalise=Fixed(False),
            scale=Number("routed_scaling_factor", 1.0),
            groups=Integer("n_group", 1),
            chosen_groups=Integer("topk_group", 1),
            group_scores=Fixed(1),
            balance=Coefficient("aux_loss_alpha", 0.001),
            names=SHARED,
        ),
    },
    feed_forward_layers=ExpertsFrom("first_k_dense_replace", absent=0),
    rules=(
        *RULES,
        Same("num_key_value_heads", "num_attention_heads"),
        Method(),
        Only("scoring_func", ("softmax",)),
        Only("norm_topk_prob", (False,)),
        Only("moe_layer_freq", (1,)),
        Absent("mlp_bias", "The feed-forward layers here have none"),
        Known(("head_dim", "qk_head_dim", "seq_aux", "ep_size", "auto_map", "n_group", "topk_group")),
    ),
    yields_to=("deepseek_v3",),
    current=_current,
)
