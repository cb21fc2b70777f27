"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060)."""

from ...family import Family
from ...fields import Flag
from ...layers import LINEAR, Every
from ...state_space import (
    MAMBA2,
    STATE_SPACE_BLOCK,
    STATE_SPACE_MODEL,
    STATE_SPACE_RULES,
    Heads,
    OutputNorm,
    of_either_library,
)

FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    mixers={LINEAR: MAMBA2},
    layers=Every(LINEAR),
    feed_forwards={},
    block=STATE_SPACE_BLOCK,
    model=STATE_SPACE_MODEL.but(tied_embeddings=Flag("tie_word_embeddings")),
    rules=(*STATE_SPACE_RULES, Heads(), OutputNorm()),
    prefix="backbone.layers.{layer}.",
    current=of_either_library,
)
