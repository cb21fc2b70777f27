"""Granite 4 (IBM, 2025): Mamba-2, attention in some layers, experts and a shared one, multipliers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...components import GATED_MLP, MIXTURE
from ...family import RULES, Family, renamed
from ...fields import Fixed, Integer
from ...layers import DENSE, EXPERTS, FULL, LINEAR, Every, LayerTypes, Switched
from ...rules import Known
from ...state_space import HYBRID_MAMBA2, Heads
from ...tensors import Weight, of_experts, rows_of
from ..dense.granite import ATTENTION_BY_MULTIPLIER, BLOCK_BY_MULTIPLIER, MODEL_BY_MULTIPLIERS

ROTARY = "rotary"
KINDS = {"full_attention": FULL, "linear_attention": LINEAR}


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Layers have had other names."""
    new = dict(renamed(layers_block_type="layer_types", num_experts="num_local_experts")(config))
    older = {"mamba": "linear_attention", "attention": "full_attention"}
    if isinstance(new.get("layer_types"), list):
        new["layer_types"] = [older.get(kind, kind) for kind in new["layer_types"]]
    return new


def _shared(number: int, within: str = "") -> Weight:
    """Of the gate and the values, one. within: the name of the layer in ours."""

    def rows(layer: nn.Module) -> Tensor:
        return rows_of(number, [layer.get_submodule(f"{within}up").out_features] * 2)  # type: ignore[list-item]

    return Weight("shared_mlp.input_linear", rows=rows)


EXPERTS_INPUT = "block_sparse_moe.input_linear.weight"
SHARED = {"gate": _shared(0), "up": _shared(1), "down": "shared_mlp.output_linear"}
FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    mixers={
        FULL: ATTENTION_BY_MULTIPLIER.but(rope_base=Fixed(None), rope_scaling=Fixed(None)),
        ROTARY: ATTENTION_BY_MULTIPLIER,
        LINEAR: HYBRID_MAMBA2,
    },
    layers=Switched(
        LayerTypes(lambda reader, depth: [LINEAR] * depth, KINDS), "position_embedding_type", "rope", (FULL, ROTARY)
    ),
    feed_forwards={
        EXPERTS: MIXTURE.but(
            experts=Integer("num_local_experts", 8),
            experts_per_token=Integer("num_experts_per_tok", 2),
            shared_hidden=Integer("shared_intermediate_size", 1024),
            names={
                "router.weight": "block_sparse_moe.router.layer.weight",
                "experts.gate.weight": Weight(EXPERTS_INPUT, rows=of_experts(0), dim=1),
                "experts.up.weight": Weight(EXPERTS_INPUT, rows=of_experts(1), dim=1),
                "experts.down.weight": "block_sparse_moe.output_linear.weight",
                "shared.gate": _shared(0, "shared."),
                "shared.up": _shared(1, "shared."),
                "shared.down": "shared_mlp.output_linear",
            },
        ),
        DENSE: GATED_MLP.but(hidden=Integer("shared_intermediate_size", 1024), names=SHARED),
    },
    feed_forward_layers=Switched(Every(EXPERTS), "num_local_experts", 0, (EXPERTS, DENSE)),
    block=BLOCK_BY_MULTIPLIER,
    model=MODEL_BY_MULTIPLIERS,
    rules=(
        *RULES,
        Heads("mamba_n_heads", "mamba_expand", "mamba_d_head", auto=True),
        Known(("mamba_chunk_size", "init_method", "normalization_function", "rope_theta", "rope_scaling",
               "rope_parameters", "mamba_norm_eps", "intermediate_size", "num_experts_per_tok",
               "router_aux_loss_coef")),
    ),
    current=_current,
    yields_to=("granite",),
)  # fmt: skip
