"""Components of DeepSeek-V3 and the models after it: latent attention, and experts with a bias and a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..mixers.softmax.latent_attention import LatentAttention
from .components import MIXTURE, Component
from .fields import Chosen, Fixed, Flag, Integer, Number, Product, Unread
from .rope import LatentScale, RopeBase, RopeScale, folded
from .tensors import Weight, halves, per_head


def _query_rows(mixer: LatentAttention) -> Tensor:
    """In each head what turns stands first here, and last there."""
    rest = mixer.key_dim - mixer.shared_dim
    return per_head(mixer.heads, torch.cat([rest + halves(mixer.shared_dim), torch.arange(rest)]))


def _latent_rows(mixer: LatentAttention) -> Tensor:
    """The same of the shared part of keys and the latent."""
    return torch.cat([mixer.latent_rank + halves(mixer.shared_dim), torch.arange(mixer.latent_rank)])


def _resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    key_dim = arguments["width"] // arguments["heads"] if arguments["key_dim"] is None else arguments["key_dim"]
    resolved = {**arguments, "key_dim": key_dim, "value_dim": arguments["value_dim"] or key_dim}
    if arguments["scale"] == (key_dim + arguments["rope_dim"]) ** -0.5:
        resolved["scale"] = None
    return folded(resolved, arguments["rope_dim"])


LATENT = Component(
    LatentAttention,
    {
        "heads": Integer("num_attention_heads"),
        "latent_rank": Integer("kv_lora_rank", 512),
        "query_rank": Fixed(None),
        "rope_dim": Integer("qk_rope_head_dim", 64),
        "key_dim": Integer("qk_nope_head_dim", 128),
        "value_dim": Integer("v_head_dim", 128),
        "rope_base": RopeBase(),
        "rope_scaling": RopeScale(),
        "scale": LatentScale(("qk_nope_head_dim", "qk_rope_head_dim")),
        "norm_eps": Fixed(1e-6),
        "bias": Flag("attention_bias"),
        "output_bias": Flag("attention_bias"),
    },
    {
        "query": Weight("self_attn.q_proj", rows=_query_rows),
        "latent": Weight("self_attn.kv_a_proj_with_mqa", rows=_latent_rows),
        "latent_norm": "self_attn.kv_a_layernorm",
        "attend": "self_attn.kv_b_proj",
        "output": "self_attn.o_proj",
    },
    _resolve,
)
COMPRESSED = LATENT.but(
    query_rank=Integer("q_lora_rank", absent=1536),
    names={
        "query_down": "self_attn.q_a_proj",
        "query_norm": "self_attn.q_a_layernorm",
        "query": Weight("self_attn.q_b_proj", rows=_query_rows),
    },
)
SHARED = {
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
}
BIASED_MIXTURE = MIXTURE.but(
    hidden=Integer("moe_intermediate_size"),
    experts=Integer("n_routed_experts"),
    shared_hidden=Product("n_shared_experts", "moe_intermediate_size"),
    score=Fixed("sigmoid"),
    renormalise=Flag("norm_topk_prob", default=True),
    scale=Number("routed_scaling_factor", 1.0),
    groups=Integer("n_group", 1),
    chosen_groups=Integer("topk_group", 1),
    group_scores=Fixed(2),
    balance=Chosen(0.0),
    bias_rate=Chosen(0.001),  # that of DeepSeek-V3
    z=Unread(),
    names={"router.bias": "mlp.gate.e_score_correction_bias", **SHARED},
)
