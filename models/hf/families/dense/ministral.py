"""Ministral 8B (Mistral AI, 2024): a Mistral of which some layers have a window."""

from ...family import Family
from ...layers import FULL, WINDOW, LayerTypes
from .mistral import DEFAULT_WINDOW
from .mistral import FAMILY as MISTRAL

FAMILY = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    mixers=MISTRAL.mixers,
    layers=LayerTypes(
        lambda reader, depth: [FULL if reader.get("sliding_window", DEFAULT_WINDOW) is None else WINDOW] * depth
    ),
    yields_to=("llama", "mistral"),
)
