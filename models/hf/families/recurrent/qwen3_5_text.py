"""Qwen3.5's language model (Qwen team, 2026): the layers of Qwen3-Next with dense feed-forward layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....mixers.delta.gated_deltanet import GatedDeltaNet
from ...components import GATED_MLP
from ...family import RULES
from ...fields import Integer
from ...layers import DENSE, FULL, LINEAR, Every
from ...rules import Absent, Known, Only, Replaced
from ...tensors import Weight, rows_of
from .qwen3_next import DELTA, GATED_ATTENTION
from .qwen3_next import FAMILY as QWEN3_NEXT


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Text has one position for a token, which is that of time, height and width alike."""
    new = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := new.get(key), Mapping):
            new[key] = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    return new


def _input(number: int) -> Weight:
    """Of queries, keys and values, one."""

    def rows(mixer: GatedDeltaNet) -> Tensor:
        keys = mixer.key_heads * mixer.key_dim
        return rows_of(number, (keys, keys, mixer.heads * mixer.value_dim))

    return Weight("linear_attn.in_proj_qkv", rows=rows)


FAMILY = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    within=("qwen3_5",),
    mixers={
        FULL: GATED_ATTENTION.but(
            kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=4, divides="num_attention_heads")
        ),
        LINEAR: DELTA.but(
            names={
                **{name: _input(number) for number, name in enumerate(("query", "key", "value"))},
                "gate": "linear_attn.in_proj_z",
                "beta": "linear_attn.in_proj_b",
                "decay": "linear_attn.in_proj_a",
            }
        ),
    },
    feed_forwards={DENSE: GATED_MLP},
    feed_forward_layers=Every(DENSE),
    rules=(
        *RULES,
        Only("attn_output_gate", (True,)),
        Absent("mlp_only_layers", "All layers have the same feed-forward layer"),
        Replaced("mtp_num_hidden_layers", 0),
        Known(("full_attention_interval", "intermediate_size", "mamba_ssm_dtype", "mtp_use_dedicated_embeddings")),
    ),
    yields_to=(),
    current=_current,
)
