"""GLM-4-0414 (Z.ai, 2025): a GLM-4 that norms what its parts return, too."""

from dataclasses import replace

from ....block import SandwichBlock
from ...components import BLOCK
from ..dense.glm import FAMILY as GLM

FAMILY = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    block=BLOCK.but(
        target=SandwichBlock,
        names={"mixer_output_norm": "post_self_attn_layernorm", "feed_forward_output_norm": "post_mlp_layernorm"},
    ),
    yields_to=(),
)
