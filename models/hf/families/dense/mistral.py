"""Mistral (Jiang et al., 2023, arXiv 2310.06825): a Llama without biases, whose layers may all have one window."""

from ...components import ATTENTION
from ...family import Family
from ...fields import Integer
from ...layers import FULL, WINDOW, OneWindow

DEFAULT_WINDOW = 4096  # without the key

attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads")
)

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=DEFAULT_WINDOW))},
    layers=OneWindow(absent=DEFAULT_WINDOW),
    yields_to=("llama",),
)
