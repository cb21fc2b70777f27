"""EXAONE 4 (LG AI Research, 2025, arXiv 2507.11407): norms of what parts return; where some layers have windows, the
others have no positions."""

from ...components import HEAD_NORMED_ATTENTION, MODEL, OUTPUT_NORM_BLOCK
from ...family import RULES, Family
from ...fields import Fixed, Integer, Number
from ...layers import FULL, WINDOW, LayerTypes, Switched, every_nth_full
from ...rules import Known

UNPLACED = "unplaced"
attention = HEAD_NORMED_ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", absent=32, divides="num_attention_heads"),
    bias=Fixed(False),
    output_bias=Fixed(False),
)

FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    mixers={
        UNPLACED: attention.but(rope_base=Fixed(None), rope_scaling=Fixed(None)),
        WINDOW: attention.but(window=Integer("sliding_window", absent=4096)),
        FULL: attention,
    },
    layers=Switched(
        LayerTypes(
            every_nth_full(4, "sliding_window_pattern", full=UNPLACED),
            {"full_attention": UNPLACED, "sliding_attention": WINDOW},
        ),
        "sliding_window",
        None,
        (UNPLACED, FULL),
        absent=4096,
    ),
    block=OUTPUT_NORM_BLOCK,
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(*RULES, Known(("sliding_window_pattern",))),
)
