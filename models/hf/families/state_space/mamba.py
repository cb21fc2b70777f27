"""Mamba (Gu and Dao, 2023, arXiv 2312.00752)."""

from ...family import Family
from ...layers import LINEAR, Every
from ...state_space import MAMBA, STATE_SPACE_BLOCK, STATE_SPACE_MODEL, STATE_SPACE_RULES, of_either_library

FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    mixers={LINEAR: MAMBA},
    layers=Every(LINEAR),
    feed_forwards={},
    block=STATE_SPACE_BLOCK,
    model=STATE_SPACE_MODEL,
    rules=STATE_SPACE_RULES,
    prefix="backbone.layers.{layer}.",
    current=of_either_library,
)
