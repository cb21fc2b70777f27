"""Mistral (Jiang et al., 2023, arXiv 2310.06825): a Llama without biases and, unless it is null, with one window."""

from ..components import ATTENTION
from ..family import Family
from ..fields import Integer
from ..layers import FULL, WINDOW, AllOrNone

ABSENT = 4096  # the window of a config.json without the key

attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads")
)

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=ABSENT))},
    layers=AllOrNone(absent=ABSENT),
    yields_to=("llama",),
)
