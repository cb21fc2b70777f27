"""OLMo 2 (arXiv 2501.00656): norms of what parts return, and of queries and keys over all heads."""

from ...components import HEAD_NORMED_ATTENTION, MODEL, OUTPUT_NORM_BLOCK
from ...family import Family
from ...fields import Fixed, Number
from ...layers import FULL

FULL_NORMED_ATTENTION = HEAD_NORMED_ATTENTION.but(qk_norm=Fixed("full"))

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    mixers={FULL: FULL_NORMED_ATTENTION},
    block=OUTPUT_NORM_BLOCK,
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
)
