"""Mixtral (Jiang et al., 2024, arXiv 2401.04088): a Mistral with experts in each layer."""

from ...components import ATTENTION, MIXTRAL_MIXTURE, MODEL
from ...family import RULES, Family, renamed
from ...fields import Integer, Number
from ...layers import EXPERTS, FULL, WINDOW, Every, OneWindow
from ...rope import RopeBase
from ...rules import Only

attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=8, divides="num_attention_heads"),
    rope_base=RopeBase(1e6),
)

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window"))},
    layers=OneWindow(),
    feed_forwards={EXPERTS: MIXTRAL_MIXTURE},
    feed_forward_layers=Every(EXPERTS),
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(*RULES, Only("router_jitter_noise", (0.0, 0))),
    current=renamed(num_experts="num_local_experts"),
)
