"""Latent attention of transformers in float64, and its parameters as ours."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, KEY, VALUE, ROPE, RANK, LENGTH = 32, 4, 6, 10, 8, 12, 37
SIZES = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "qk_nope_head_dim": KEY,
    "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "kv_lora_rank": RANK,
}  # fmt: skip
OURS = {"heads": HEADS, "key_dim": KEY, "value_dim": VALUE, "rope_dim": ROPE, "latent_rank": RANK}


def exact(theirs: nn.Module) -> nn.Module:
    """Their layers in float64 throughout, with random parameters: norms and angles are float32 as published."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(
                F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon
            )
        if hasattr(module, "inv_freq"):
            module.forward = lambda x, position_ids, made=module: angles(position_ids, made)
    return theirs


def angles(positions: Tensor, rotary: nn.Module) -> tuple[Tensor, Tensor]:
    turned = positions[..., None].double() * rotary.inv_freq.double()
    turned = torch.cat([turned, turned], dim=-1)
    return turned.cos() * rotary.attention_scaling, turned.sin() * rotary.attention_scaling


def shared_first(x: Tensor, heads: int, kept: int, interleaved: bool) -> Tensor:
    """Rows `[heads (kept + ROPE), …]` of theirs as ours: the dims that heads share first, pairs as halves."""
    own, shared = x.unflatten(0, (heads, -1)).split([kept, ROPE], dim=1)
    if interleaved:
        shared = torch.cat([shared[:, ::2], shared[:, 1::2]], dim=1)
    return torch.cat([shared, own], dim=1).flatten(0, 1)


def as_ours(theirs: dict[str, Tensor], interleaved: bool) -> dict[str, Tensor]:
    """Their parameters, or the gradients of these, as ours."""
    query = "q_proj" if "q_proj.weight" in theirs else "q_b_proj"
    names = {
        "q_a_proj.weight": "query_down.weight", "q_a_proj.bias": "query_down.bias",
        "q_a_layernorm.weight": "query_norm.weight", "kv_a_layernorm.weight": "latent_norm.weight",
        "kv_b_proj.weight": "attend.weight", "g_proj.weight": "gate.project.weight",
        "o_proj.weight": "output.weight", "o_proj.bias": "output.bias",
    }  # fmt: skip
    made = {ours: theirs[name] for name, ours in names.items() if name in theirs}
    made["query.weight"] = shared_first(theirs[f"{query}.weight"], HEADS, KEY, interleaved)
    for kind in ("weight", "bias"):
        if (rows := theirs.get(f"kv_a_proj_with_mqa.{kind}")) is not None:
            made[f"latent.{kind}"] = shared_first(rows, 1, RANK, interleaved)
    indexer = {"wq_b": "query", "wk": "key", "k_norm": "key_norm", "weights_proj": "weight"}
    for name, x in theirs.items():
        if name.startswith("indexer."):
            _, layer, kind = name.split(".")
            made[f"indexer.{indexer[layer]}.{kind}"] = x
    return made


def model_as_ours(theirs: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {
        "embedding.weight": values["model.embed_tokens.weight"], "norm.weight": values["model.norm.weight"],
        "head.weight": values["lm_head.weight"],
    }  # fmt: skip
    for layer in range(len(theirs.model.layers)):
        block, at = f"blocks.{layer}", f"model.layers.{layer}"
        attention = {
            name.removeprefix(f"{at}.self_attn."): x for name, x in values.items() if f"{at}.self_attn." in name
        }
        made |= {f"{block}.mixer.{name}": x for name, x in as_ours(attention, True).items()}
        for ours, name in {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}.items():
            made[f"{block}.feed_forward.{ours}.weight"] = values[f"{at}.mlp.{name}.weight"]
        made[f"{block}.mixer_norm.weight"] = values[f"{at}.input_layernorm.weight"]
        made[f"{block}.feed_forward_norm.weight"] = values[f"{at}.post_attention_layernorm.weight"]
    return made
