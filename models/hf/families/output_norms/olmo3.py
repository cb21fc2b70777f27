"""OLMo 3 (Ai2, 2025, arXiv 2512.13961): an OLMo 2 with windows in three of four layers; each type has its own RoPE."""

from ...components import MODEL, OUTPUT_NORM_BLOCK
from ...family import RULES, Family
from ...fields import Integer, Number
from ...layers import FULL, WINDOW, LayerTypes, every_nth_full
from ...rope import RopeBase, RopeByLayerType, RopeScale
from .olmo2 import FULL_NORMED_ATTENTION

FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    mixers={
        FULL: FULL_NORMED_ATTENTION.but(
            rope_base=RopeBase(5e5, layer_type="full_attention"),
            rope_scaling=RopeScale(layer_type="full_attention"),
        ),
        WINDOW: FULL_NORMED_ATTENTION.but(
            window=Integer("sliding_window", absent=4096),
            rope_base=RopeBase(5e5, layer_type="sliding_attention", local=True),
            rope_scaling=RopeScale(layer_type="sliding_attention", local=True),
        ),
    },
    layers=LayerTypes(every_nth_full(4)),
    block=OUTPUT_NORM_BLOCK,
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(*RULES, RopeByLayerType()),
    yields_to=("olmo2",),
)
