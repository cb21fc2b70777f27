"""Reading config.json: typed values, every problem named at once, and the two ways of writing rotary embeddings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ...kernels.pointwise import RopeScaling

logger = logging.getLogger("longreach")

# Keys of every config.json that say nothing about the function that the weights compute.
IGNORED = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "pretraining_tp",
        "max_position_embeddings",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "task_specific_params",
    ]
)

# Keys that an export says anew or that are of another file, so that those of the model it began with do not count.
SAID_ANEW = frozenset(
    [
        "rope_parameters",
        "original_max_position_embeddings",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "quantization_config",
        "auto_map",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
    ]
)


class ConfigReader:
    """A config.json, read key by key; `finish` raises one ValueError that names every key that does not fit."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []
        self._read: set[str] = set(IGNORED)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.config.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{key} must be a positive integer; got {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; `default` where the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        return self.positive(key, value)

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"{key} must be a positive number; got {value!r}")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problems.append(f"{key} must be true or false; got {value!r}")
            return default
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Only these values of the key are computed here; an absent or null key stands for the first."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} must be {' or '.join(map(repr, allowed))}; got {value!r}")

    def absent(self, key: str, why: str) -> None:
        value = self.get(key)
        if value not in (None, False, {}, []):
            self.problems.append(f"{key} must be absent; got {value!r}. {why}")

    def finish(self) -> None:
        if self.problems:
            raise ValueError(
                f"config.json describes a {self.config.get('model_type')} model that is not supported: "
                + "; ".join(self.problems)
            )
        unknown = sorted(set(self.config) - self._read)
        if unknown:
            logger.warning("config.json: ignored keys that this architecture does not define: %s", ", ".join(unknown))


# Our name of each setting of a scaling (those of `RopeScaling`) and transformers' name of it.
_SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def read_rope(reader: ConfigReader) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling settings) from `rope_theta` and `rope_scaling`, or from `rope_parameters` of transformers 5."""
    scaling = reader.get("rope_scaling")
    parameters = reader.get("rope_parameters")
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = dict(scaling or parameters or {})
    base = reader.number("rope_theta", 10000.0)
    reader.only("partial_rotary_factor", 1.0)
    if any(isinstance(value, Mapping) for value in rope.values()):
        reader.problems.append(f"{name} must be one for all layers; got one a layer type: {sorted(rope)}")
        return base, None
    if rope.get("rope_theta") is not None:
        base = reader.positive(f"{name}.rope_theta", rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        reader.problems.append(f"{name}.partial_rotary_factor must be 1.0; got {rope['partial_rotary_factor']!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in _SCALING_KEYS:
        reader.problems.append(f"{name}.rope_type must be one of default, {', '.join(_SCALING_KEYS)}; got {kind!r}")
        return base, None
    return base, _read_scaling(reader, name, kind, rope)


def _read_scaling(reader: ConfigReader, name: str, kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    keys = _SCALING_KEYS[kind]
    # transformers: a key beside the scaling's own dict wins; without either, the length is that of the config.
    original = reader.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings") or reader.get("max_position_embeddings")
    rope["original_max_position_embeddings"] = original
    if kind == "yarn":
        if rope.get("truncate") not in (None, True):
            reader.problems.append(f"{name}.truncate must be true; got {rope['truncate']!r}")
        if rope.get("factor") is None and original:
            rope["factor"] = reader.integer("max_position_embeddings") / original
        rope["attention_factor"] = _yarn_attention_factor(rope)
        rope["beta_fast"] = rope.get("beta_fast") or 32.0
        rope["beta_slow"] = rope.get("beta_slow") or 1.0
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate", "mscale", "mscale_all_dim"}
    unknown = sorted(set(rope) - known - set(keys.values()) - {"original_max_position_embeddings"})
    if unknown:
        reader.problems.append(f"{name} of type {kind} must not hold {', '.join(unknown)}")
    scaling: dict[str, Any] = {"kind": kind}
    for ours, theirs in keys.items():
        value = rope.get(theirs)
        if value is None and theirs == "attention_factor":
            continue
        scaling[ours] = reader.positive(f"{name}.{theirs}", value)
    if "original_length" in scaling:
        scaling["original_length"] = int(scaling["original_length"])
    return scaling


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float | None:
    """DeepSeek writes YaRN's factor as a ratio of two; None leaves it to the formula, 0.1 ln(factor) + 1."""
    mscale, all_dims, factor = rope.get("mscale"), rope.get("mscale_all_dim"), rope.get("factor")
    if rope.get("attention_factor") is not None or not (mscale and all_dims and factor):
        return rope.get("attention_factor")
    if factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * all_dims * math.log(factor) + 1.0)


def write_rope(base: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every transformers since 4.43 reads, and 5 too."""
    if scaling is None:
        return {"rope_theta": float(base), "rope_scaling": None}
    whole = RopeScaling(**scaling)
    written: dict[str, Any] = {}
    for ours, theirs in _SCALING_KEYS[whole.kind].items():
        value = getattr(whole, ours)
        if value is None and ours != "attention_factor":  # which without a value is YaRN's formula there too
            value = whole.setting(ours)
        if value is not None:
            written[theirs] = value
    return {"rope_theta": float(base), "rope_scaling": {"rope_type": whole.kind, **written}}
