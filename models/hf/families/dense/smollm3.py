"""SmolLM3 (Hugging Face, 2025): a Llama of which each fourth layer has no positions; those may have a window."""

from collections.abc import Sequence

from ...components import ATTENTION, GATED_MLP, MODEL
from ...config import ConfigReader, ConfigWriter
from ...family import RULES, Family
from ...fields import Fixed, Flag, Integer
from ...layers import DENSE, FULL, WINDOW, ByPositions
from ...rope import RopeBase
from ...rules import Known

UNPLACED, UNPLACED_WINDOW = "unplaced", "unplaced_window"


class SwitchedByPositions(ByPositions):
    """There are windows where `use_sliding_window` is true."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        layers, used = super().read(reader, depth), reader.flag("use_sliding_window")
        if not used and {WINDOW, UNPLACED_WINDOW} & set(layers):
            reader.problem("use_sliding_window must be true with sliding_attention in layer_types; got false")
        return layers

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        super().write(writer, layers)
        writer.config["use_sliding_window"] = bool({WINDOW, UNPLACED_WINDOW} & set(layers))


def _kind(reader: ConfigReader, placed: bool) -> str:
    windows = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    return WINDOW if windows and not placed else FULL


attention = ATTENTION.but(
    kv_heads=Integer("num_key_value_heads", "num_attention_heads", absent=4, divides="num_attention_heads"),
    rope_base=RopeBase(2e6),
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
)
unplaced = attention.but(rope_base=Fixed(None), rope_scaling=Fixed(None))
window = Integer("sliding_window")

FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    mixers={
        FULL: attention,
        UNPLACED: unplaced,
        WINDOW: attention.but(window=window),
        UNPLACED_WINDOW: unplaced.but(window=window),
    },
    layers=SwitchedByPositions(
        names={
            (FULL, True): FULL, (FULL, False): UNPLACED, (WINDOW, True): WINDOW, (WINDOW, False): UNPLACED_WINDOW,
        },
        kinds={"full_attention": FULL, "sliding_attention": WINDOW},
        kind=_kind,
    ),
    feed_forwards={DENSE: GATED_MLP.but(bias=Flag("mlp_bias"))},
    model=MODEL.but(tied_embeddings=Flag("tie_word_embeddings", default=True)),
    rules=(*RULES, Known(("no_rope_layer_interval", "sliding_window", "use_sliding_window"))),
    yields_to=("llama", "mistral", "ministral"),
)  # fmt: skip
