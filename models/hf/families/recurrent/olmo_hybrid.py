"""OLMo Hybrid (Ai2, 2026): Gated DeltaNet, and attention layers that norm what their parts return."""

from ....block import OutputNormBlock
from ...components import BLOCK
from ...config import ConfigReader
from ...family import RULES, Family
from ...fields import Fixed, Flag, Integer, OfKind
from ...layers import FULL, LINEAR, LayerTypes
from ...rope import RopeBase
from ...rules import Known
from ...tensors import convolution
from ..output_norms.olmo2 import FULL_NORMED_ATTENTION
from .qwen3_next import DELTA, KINDS


def _listed(reader: ConfigReader, depth: int) -> list[str]:
    """Every fourth layer, or the last."""
    return [FULL if layer % 4 == 3 or (depth < 4 and layer == depth - 1) else LINEAR for layer in range(depth)]


FAMILY = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    mixers={
        FULL: FULL_NORMED_ATTENTION.but(rope_base=RopeBase(optional=True)),
        LINEAR: DELTA.but(
            heads=Integer("linear_num_value_heads", "num_attention_heads"),
            key_heads=Integer("linear_num_key_heads", "num_attention_heads", divides="linear_num_value_heads"),
            key_dim=Integer("linear_key_head_dim"),
            value_dim=Integer("linear_value_head_dim"),
            negative_eigenvalues=Flag("linear_allow_neg_eigval", default=True),
            norm_eps=Fixed(1e-5),
            names={
                "query": "linear_attn.q_proj",
                "key": "linear_attn.k_proj",
                "value": "linear_attn.v_proj",
                "gate": "linear_attn.g_proj",
                "beta": "linear_attn.b_proj",
                "decay": "linear_attn.a_proj",
                "conv.weight": convolution(
                    "linear_attn.{}_conv1d.weight",
                    parts=("q", "k", "v"),
                    sizes=lambda mixer: (
                        mixer.key_heads * mixer.key_dim,
                        mixer.key_heads * mixer.key_dim,
                        mixer.heads * mixer.value_dim,
                    ),
                ),
                "norm": "linear_attn.o_norm",
                "output": "linear_attn.o_proj",
            },
        ),
    },
    layers=LayerTypes(_listed, KINDS),
    block=BLOCK.but(target=OutputNormBlock, mixers=OfKind(FULL)),
    block_names={
        FULL: {"mixer_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"},
        LINEAR: {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
    },
    aliases=(
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
    rules=(
        *RULES,
        Known(("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")),
    ),
)
