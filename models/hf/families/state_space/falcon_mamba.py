"""Falcon Mamba (arXiv 2410.05355): a Mamba with norms without weights on the input of its steps, B and C."""

from ...family import Family
from ...fields import Fixed, Number
from ...layers import LINEAR, Every
from ...state_space import MAMBA, STATE_SPACE_BLOCK, STATE_SPACE_MODEL, STATE_SPACE_RULES

FAMILY = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    mixers={LINEAR: MAMBA.but(part_norms=Fixed("weightless"), norm_eps=Number("mixer_rms_eps", 1e-6))},
    layers=Every(LINEAR),
    feed_forwards={},
    block=STATE_SPACE_BLOCK,
    model=STATE_SPACE_MODEL,
    rules=STATE_SPACE_RULES,
    prefix="backbone.layers.{layer}.",
)
