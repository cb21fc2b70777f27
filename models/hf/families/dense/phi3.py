"""Phi-3 and Phi-4-mini (arXiv 2404.14219, 2503.01743): fused projections, LongRoPE of a part of each head."""

from collections.abc import Mapping
from typing import Any

from ...components import ATTENTION, FUSED, FUSED_GATED_MLP, MODEL
from ...family import RULES, Family
from ...fields import Integer, Number
from ...layers import DENSE, FULL, WINDOW, OneWindow
from ...rope import RopeBase, RopePart, RopeScale
from ...rules import Absent, Known, Only

ORIGINAL = 4096  # original_max_position_embeddings without the key


def _current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scaling of this family has had other names."""
    new = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = new.get(key)
        if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
            new[key] = {**scaling, "rope_type": "longrope"}
    return new


def _written(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first versions take a scaling of three keys, and the factor from two lengths."""
    scaling = config["rope_scaling"]
    if scaling is None:
        return config
    new = {"type": "longrope", **scaling}
    original = new.pop("original_max_position_embeddings")
    del new["rope_type"]
    if config.get("max_position_embeddings", 0) / original == new["factor"]:
        del new["factor"]
    return {**config, "original_max_position_embeddings": original, "rope_scaling": new}


attention = ATTENTION.but(
    rope_base=RopeBase(partial=True),
    rope_fraction=RopePart(),
    rope_scaling=RopeScale(partial=True, original=ORIGINAL, kinds=("longrope",)),
    names=FUSED,
)

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    mixers={FULL: attention, WINDOW: attention.but(window=Integer("sliding_window"))},
    layers=OneWindow(),
    feed_forwards={DENSE: FUSED_GATED_MLP},
    model=MODEL.but(norm_eps=Number("rms_norm_eps", 1e-5)),
    rules=(
        *RULES,
        Only("resid_pdrop", (0.0, 0)),
        Only("embd_pdrop", (0.0, 0)),
        *(Absent(f"{part}_bias", "transformers computes this family without it")
          for part in ("attention", "mlp", "lm_head")),
        Known(("full_attn_mod", "interpolate_factor")),
    ),
    yields_to=("llama", "mistral"),
    current=_current,
    written=_written,
)  # fmt: skip
