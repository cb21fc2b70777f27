"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases of queries, keys and values; windows in some layers."""

from ...components import ATTENTION
from ...family import Family
from ...fields import Fixed, Integer
from ...layers import FULL, WINDOW, SwitchedWindows

DEFAULT_WINDOW = 4096  # without the key

attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=32, divides="num_attention_heads"),
    bias=Fixed(True),
)

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=DEFAULT_WINDOW))},
    layers=SwitchedWindows(absent=DEFAULT_WINDOW, first=28),
)
