"""Qwen3 (arXiv 2505.09388): a norm of each query and key head, biases by a key, windows in some layers."""

from ...components import HEAD_NORMED_ATTENTION
from ...family import RULES, Family
from ...fields import Integer
from ...layers import FULL, WINDOW, SwitchedWindows
from ...rules import Absent

DEFAULT_WINDOW = 4096  # without the key

attention = HEAD_NORMED_ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=32, divides="num_attention_heads"),
    head_dim=Integer("head_dim", 128),
)

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window", absent=DEFAULT_WINDOW))},
    layers=SwitchedWindows(absent=DEFAULT_WINDOW, first=28),
    rules=(*RULES, Absent("mlp_bias", "Its feed-forward layers have none")),
)
