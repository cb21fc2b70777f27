"""RWKV-4 (arXiv 2305.13048): WKV, and channel mixing, both of inputs mixed with those of the token before."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ....feed_forward.rwkv import RWKVChannelMixing
from ....mixers.elementwise.rwkv4 import RWKV4
from ...components import BLOCK, MODEL, Component
from ...family import Family, renamed
from ...fields import Fixed, Integer
from ...layers import EveryOf
from ...rules import Absent, Known, Only, Same
from ...tensors import Weight

OWN, BEFORE = (
    "own",
    "before",
)  # whose part `mix` holds: that of the token itself, as in checkpoints, or of the one before


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    new = dict(renamed(context_length="max_position_embeddings")(config))
    if new.get("intermediate_size") is None and isinstance(width := new.get("hidden_size"), int):
        new["intermediate_size"] = 4 * width
    return new


def _mixes(name: str, parts: tuple[str, ...]) -> Callable[[str], Weight]:
    """The place of `mix`, which has a row for each of the parts, by whose part it holds."""

    def read(theirs: Tensor) -> Tensor:
        return theirs.squeeze(0)

    def write(ours: Tensor) -> Tensor:
        return ours.unsqueeze(0)

    def write_own(ours: Tensor) -> Tensor:
        return 1 - ours.unsqueeze(0)

    return lambda kind: Weight(name, parts, read=read, write=write if kind == OWN else write_own)


def _kinds(component: Component, mixes: Callable[[str], Weight]) -> dict[str, Component]:
    return {kind: component.but(own_mix=Fixed(kind == OWN), names={"mix": mixes(kind)}) for kind in (OWN, BEFORE)}


FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    mixers=_kinds(
        Component(
            RWKV4,
            {},
            {
                "decay": "attention.time_decay",
                "bonus": "attention.time_first",
                **{name: f"attention.{name}" for name in ("receptance", "key", "value", "output")},
            },
        ),
        _mixes("attention.time_mix_{}", ("receptance", "key", "value")),
    ),
    layers=EveryOf((OWN, BEFORE)),
    feed_forwards=_kinds(
        Component(
            RWKVChannelMixing,
            {"hidden": Integer("intermediate_size"), "receptance": Fixed(True)},
            {"up": "feed_forward.key", "down": "feed_forward.value", "receptance": "feed_forward.receptance"},
        ),
        _mixes("feed_forward.time_mix_{}", ("key", "receptance")),
    ),
    feed_forward_layers=EveryOf((OWN, BEFORE)),
    block=BLOCK.but(norm_eps=Fixed(1e-5), names={"mixer_norm": "ln1", "feed_forward_norm": "ln2"}),
    model=MODEL.but(
        norm=Fixed("layer"),
        norm_eps=Fixed(1e-5),
        embedding_norm=Fixed(True),
        names={
            "embedding": "rwkv.embeddings",
            "embedding_norm": "rwkv.blocks.0.pre_ln",
            "norm": "rwkv.ln_out",
            "head": "head",
        },
    ),
    rules=(
        Only("layer_norm_epsilon", (1e-5,)),  # the last norm has this one in any case
        Same("attention_hidden_size", "hidden_size"),
        Absent("quantization_config", "Save the model dequantised"),
        Known(("rescale_every",)),  # what it changes of the weights when it decodes, it changes back
    ),
    prefix="rwkv.blocks.{layer}.",
    current=_current,
    written=renamed(max_position_embeddings="context_length"),
)
