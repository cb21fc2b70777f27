"""MiniMax-01 (arXiv 2501.08313): lightning attention with full attention between, experts, weighted residual paths."""

from collections.abc import Mapping
from typing import Any

from ....block import MiniMaxBlock
from ....mixers.linear.lightning_attention import LightningAttention
from ...components import ATTENTION, BLOCK, MIXTRAL_MIXTURE, MODEL, Component
from ...config import ConfigReader
from ...family import RULES, Family, renamed
from ...fields import Equal, Fixed, Integer, Number, Quotient
from ...layers import EXPERTS, FULL, LINEAR, Every, LayerTypes
from ...rope import RopeBase, RopeFraction
from ...rules import Absent, Known, Only
from ...tensors import Weight, rows_of

ALPHAS = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
BETAS = ("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor")
KINDS = {"full_attention": FULL, "linear_attention": LINEAR}


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first versions called layers by numbers: 0 for lightning attention, 1 for full attention."""
    new = dict(renamed(num_experts="num_local_experts")(config))
    for kind, theirs in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp")):
        for factor in ("alpha", "beta"):
            if (old := new.pop(f"layernorm_{theirs}_{factor}", None)) is not None:
                new.setdefault(f"{kind}_{factor}_factor", old)
    numbers = new.pop("attn_type_list", None)
    if new.get("layer_types") is None and numbers is not None:
        new["layer_types"] = ["full_attention" if number else "linear_attention" for number in numbers]
    return new


def _alternating(reader: ConfigReader, depth: int) -> list[str]:
    return [LINEAR if layer % 2 else FULL for layer in range(depth)]


def _part(number: int) -> Weight:
    """Of each head's queries, keys and values, which stand one after the other, one."""
    return Weight("self_attn.qkv_proj", rows=lambda mixer: rows_of(number, [mixer.head_dim] * 3, mixer.heads))


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**arguments, "head_dim": arguments["head_dim"] or arguments["width"] // arguments["heads"]}


def _resolve_block(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    depth, alpha = arguments["depth"], arguments["alpha"]
    return {**arguments, "alpha": (2 * depth) ** 0.25 if alpha is None else alpha}


LIGHTNING = Component(
    LightningAttention,
    {
        "heads": Integer("num_attention_heads"),
        "head_dim": Integer("head_dim", Quotient("hidden_size", "num_attention_heads")),
        "norm_eps": Fixed(1e-6),
    },
    {
        "query": _part(0),
        "key": _part(1),
        "value": _part(2),
        "gate": "self_attn.output_gate",
        "norm": "self_attn.norm",
        "output": "self_attn.out_proj",
    },
    _resolve,
)

FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    mixers={
        FULL: ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
            rope_base=RopeBase(1e6),
            rope_fraction=RopeFraction("rotary_dim", "head_dim"),
        ),
        LINEAR: LIGHTNING,
    },
    layers=LayerTypes(_alternating, KINDS),
    feed_forwards={EXPERTS: MIXTRAL_MIXTURE},
    feed_forward_layers=Every(EXPERTS),
    block=BLOCK.but(target=MiniMaxBlock, alpha=Equal(ALPHAS, 1.0), beta=Equal(BETAS, 1.0), resolve=_resolve_block),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(
        *RULES,
        Only("router_jitter_noise", (0.0, 0)),
        Absent("sliding_window", "Full attention has no window in this family"),
        Only("postnorm", (True,)),
        Absent("shared_intermediate_size", "Its layers have no shared expert"),
        Known(("block_size", "shared_moe_mode", "auto_map")),
    ),
    ignored=(r"rotary_emb\.inv_freq$", r"\.(slope_rate|query_decay|key_decay|diagonal_decay)$"),
    current=_current,
)
