"""MiniMax-M2 (MiniMax, 2025): full attention with norms over all heads, experts chosen by scores and a bias."""

from collections.abc import Mapping
from typing import Any

from ...components import ATTENTION, MIXTRAL_MIXTURE
from ...config import ConfigReader, ConfigWriter
from ...family import RULES, Family, renamed
from ...fields import Chosen, Fixed, Integer, Unread
from ...layers import EXPERTS, FULL, Every
from ...rope import RopeBase, RopePart, RopeScale
from ...rules import Absent, Known, Only, Rule

HEAD_DIM = 128  # without the key


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The hub has the number of a head's dims that turn, and numbers for kinds of layers: 1 for full attention."""
    new = dict(renamed(num_experts="num_local_experts")(config))
    turned, size = new.pop("rotary_dim", None), new.get("head_dim", HEAD_DIM)
    if isinstance(turned, int) and isinstance(size, int):
        new.setdefault("partial_rotary_factor", turned / size)
    if (numbers := new.pop("attn_type_list", None)) is not None:
        new.setdefault("layer_types", ["full_attention" if number == 1 else "linear_attention" for number in numbers])
    return new


class RotaryDim(Rule):
    """The number of a head's dims that turn, which the hub's own code reads."""

    def read(self, reader: ConfigReader) -> None:
        pass

    def write(self, writer: ConfigWriter) -> None:
        config = writer.config
        if "head_dim" in config and "partial_rotary_factor" in config:
            config["rotary_dim"] = round(config["partial_rotary_factor"] * config["head_dim"])


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            head_dim=Integer("head_dim", HEAD_DIM),
            qk_norm=Fixed("full"),
            norm_eps=Unread("rms_norm_eps"),
            rope_base=RopeBase(5e6, partial=True),
            rope_fraction=RopePart(),
            rope_scaling=RopeScale(partial=True),
            names={"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
        )
    },
    feed_forwards={
        EXPERTS: MIXTRAL_MIXTURE.but(
            experts=Integer("num_local_experts", 256),
            experts_per_token=Integer("num_experts_per_tok", 8),
            score=Fixed("sigmoid"),
            bias_rate=Chosen(0.001),
            names={"router.bias": "block_sparse_moe.e_score_correction_bias"},
        )
    },
    feed_forward_layers=Every(EXPERTS),
    rules=(
        *RULES,
        Only("router_jitter_noise", (0.0, 0)),
        Only("scoring_func", ("sigmoid",)),
        Only("use_qk_norm", (True,)),
        Only("qk_norm_type", ("per_layer",)),
        Only("use_routing_bias", (True,)),
        Absent("shared_intermediate_size", "Its layers have no shared expert"),
        RotaryDim(),
        Known(("use_mtp", "num_mtp_modules", "mtp_transformer_layers")),
    ),
    current=_current,
)
