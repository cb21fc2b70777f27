"""Rotary positions in config.json: `rope_theta` with `rope_scaling`, or `rope_parameters` of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.pointwise import RopeScaling
from .config import ConfigReader, ConfigWriter
from .fields import Field
from .rules import Rule

# No keys of a config.json: `RopeByLayerType` writes what is left there.
LOCAL_BASE, LOCAL_SCALING = "local_rope_theta", "local_rope_scaling"

# Our name of each setting of a scaling (those of `RopeScaling`) and transformers' name of it.
_SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},  # its original length is the config's own
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
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "attention_factor": "attention_factor",
    },
}
_OPTIONAL = ("attention_factor", "truncate")  # without a value they mean the same there


@dataclass(frozen=True)
class RopeBase(Field):
    """`rope_theta`; None, which stands for no rotation, is not expressed.

    key: of the base, where layers of this kind have another one. layer_type: that of the layers, where each has its own
    settings in `rope_parameters`. local: whether `RopeByLayerType` writes it, and `rope_scaling` is of other layers.
    partial: whether `partial_rotary_factor` is another field's; else all dims turn. optional: whether a base that is
    said to be null stands for no rotation.
    """

    default: float = 10000.0
    key: str = "rope_theta"
    layer_type: str | None = None
    local: bool = False
    partial: bool = False
    optional: bool = False

    def read(self, reader: ConfigReader) -> float | None:
        rope = reader.get("rope_parameters")
        said = isinstance(rope, Mapping) and "rope_theta" in rope and rope["rope_theta"] is None
        if self.optional and said and reader.get(self.key) is None:
            return None
        scaled = self.key == "rope_theta" and not self.local
        return _read(reader, self.default, self.key, self.layer_type, self.partial, scaled=scaled)[0]

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value is None and self.optional:
            writer.put("rope_parameters", {"rope_type": "default", "rope_theta": None}, setting)
        elif value is None:
            writer.refuse(setting, value)
        else:
            writer.put(LOCAL_BASE if self.local else self.key, float(value), setting)


@dataclass(frozen=True)
class RopeFraction(Field):
    """The part of a head's dims that turns, of which `key` gives the number; all without it."""

    key: str
    size: str = "head_dim"

    def read(self, reader: ConfigReader) -> float:
        turned, size = reader.get(self.key), reader.get(self.size)
        if turned is None:
            return 1.0
        heads, width = reader.integer("num_attention_heads"), reader.integer("hidden_size")
        return reader.integer(self.key) / (width // heads if size is None else reader.integer(self.size))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        if value != 1.0:
            writer.put(self.key, round(value * writer.config[self.size]), setting)


@dataclass(frozen=True)
class RopePart(Field):
    """`partial_rotary_factor`, the part of a head's dims that turns; `default` without it."""

    default: float = 1.0

    def read(self, reader: ConfigReader) -> float:
        rope = reader.get("rope_parameters") or reader.get("rope_scaling") or {}
        value = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
        value = reader.get("partial_rotary_factor") if value is None else value
        return self.default if value is None else reader.positive("partial_rotary_factor", value)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("partial_rotary_factor", float(value), setting)


@dataclass(frozen=True)
class RopeScale(Field):
    """`rope_scaling`, which transformers reads since 4.43, and in version 5 too. The settings are as of `RopeBase`.

    local: whether `RopeByLayerType` writes it, and `rope_scaling` is of other layers. original:
    `original_max_position_embeddings` of config.json without that key, where it counts more than that of the scaling.
    kinds: those that the family's class knows.
    """

    layer_type: str | None = None
    partial: bool = False
    local: bool = False
    original: int | None = None
    kinds: tuple[str, ...] = tuple(_SCALING_KEYS)

    def read(self, reader: ConfigReader) -> dict[str, Any] | None:
        partial, kinds, original = self.partial, self.kinds, self.original
        return _read(reader, 1.0, "rope_theta", self.layer_type, partial, kinds, original, scaled=not self.local)[1]

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        key = LOCAL_SCALING if self.local else "rope_scaling"
        if value is None:
            writer.put(key, None, setting)
        elif value["kind"] not in self.kinds:
            writer.refuse(setting, value, f", whose kind must be one of {', '.join(self.kinds) or 'none'}")
        else:
            writer.put(key, _written(RopeScaling(**value)), setting)
            if value["kind"] == "dynamic":
                writer.put("max_position_embeddings", value["original_length"], setting)


@dataclass(frozen=True)
class RopeByLayerType(Rule):
    """`rope_parameters` by layer type, which say what the older keys cannot: how layers with a window are scaled.

    base: the key of the base of those layers, if there is one: then older keys are written where they do.
    """

    base: str | None = None

    def read(self, reader: ConfigReader) -> None:
        pass

    def write(self, writer: ConfigWriter) -> None:
        config = writer.config
        scaling = config.pop(LOCAL_SCALING, None)
        if self.base is not None and scaling is None:
            return
        said = {
            "full_attention": (config.get("rope_theta"), config.get("rope_scaling")),
            "sliding_attention": (config.get(self.base) if self.base else config.pop(LOCAL_BASE, None), scaling),
        }
        config["rope_scaling"] = None
        config["rope_parameters"] = {
            kind: {"rope_type": "default", **(scaling or {}), "rope_theta": base}
            for kind, (base, scaling) in said.items()
            if base is not None
        }


def folded(arguments: Mapping[str, Any], dims: float) -> Mapping[str, Any]:
    """A mixer's arguments, where a scaling that only changes the base of `dims` dims is the base that it makes.

    No checkpoint of transformers says ntk, nor for which length dynamic stands.
    """
    scaling, base = arguments["rope_scaling"], arguments["rope_base"]
    if scaling is None or base is None:
        return arguments
    whole = RopeScaling(**scaling)
    if whole.kind == "ntk" or (whole.kind == "dynamic" and whole.length is not None):
        return {**arguments, "rope_base": whole.base(base, round(dims)), "rope_scaling": None}
    return arguments


@dataclass(frozen=True)
class LatentScale(Field):
    """The scale of logits, which YaRN multiplies by the square of 0.1 mscale_all_dim ln(factor) + 1 (DeepSeek).

    key_dims: keys whose sum is the size of a head's keys. The default scale is not written.
    """

    key_dims: tuple[str, ...]

    def read(self, reader: ConfigReader) -> float | None:
        rope = dict(reader.get("rope_scaling") or reader.get("rope_parameters") or {})
        kind, all_dims = rope.get("rope_type", rope.get("type", "default")), rope.get("mscale_all_dim")
        if kind == "default" or not all_dims:
            return None
        factor = reader.positive("rope_scaling.factor", rope.get("factor"))
        return self._scale(sum(reader.integer(key) for key in self.key_dims), factor, all_dims)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        size = sum(writer.config[key] for key in self.key_dims)
        if value is None or value == size**-0.5:
            return
        rope = writer.config.get("rope_scaling") or {}
        factor = rope.get("factor", 1.0)
        ratio = math.sqrt(value * size**0.5)
        if factor <= 1 or ratio <= 1:
            writer.refuse(setting, value, ", which must be 1 / sqrt(key dims), or more with YaRN")
            return
        rope["mscale_all_dim"] = round((ratio - 1) / (0.1 * math.log(factor)), 12)
        rope.setdefault("attention_factor", 0.1 * math.log(factor) + 1)  # which else follows from mscale_all_dim

    @staticmethod
    def _scale(size: int, factor: float, all_dims: float) -> float:
        ratio = 0.1 * all_dims * math.log(factor) + 1 if factor > 1 else 1.0
        return size**-0.5 * ratio * ratio


def _read(
    reader: ConfigReader,
    default: float = 10000.0,
    key: str = "rope_theta",
    layer_type: str | None = None,
    partial: bool = False,
    kinds: tuple[str, ...] = tuple(_SCALING_KEYS),
    original: int | None = None,
    scaled: bool = True,
) -> tuple[float, dict[str, Any] | None]:
    """(base, settings of `RopeScaling`)."""
    name, rope = _said(reader, layer_type, scaled)
    base = reader.number(key, default)
    if not partial:
        reader.only("partial_rotary_factor", 1.0)
    if any(isinstance(value, Mapping) for value in rope.values()):
        reader.problem(f"{name} must be one for all layers; got one a layer type: {sorted(rope)}")
        return base, None
    if rope.get("rope_theta") is not None:
        base = reader.positive(f"{name}.rope_theta", rope["rope_theta"])
    if not partial and rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        reader.problem(f"{name}.partial_rotary_factor must be 1.0; got {rope['partial_rotary_factor']!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in kinds:
        known = f"one of default, {', '.join(kinds)}" if kinds else "default"
        reader.problem(f"{name}.rope_type must be {known}; got {kind!r}")
        return base, None
    # transformers: a key beside the scaling's own dict wins; without either, the length is that of the config.
    beside = reader.get("original_max_position_embeddings", original) if layer_type is None else None
    length = beside or rope.get("original_max_position_embeddings") or reader.get("max_position_embeddings")
    rope["original_max_position_embeddings"] = length
    return base, _read_scaling(reader, name, kind, rope)


def _said(reader: ConfigReader, layer_type: str | None, scaled: bool) -> tuple[str, dict[str, Any]]:
    """The key that speaks of these layers, and what it says. scaled: whether `rope_scaling` does, if it is there."""
    scaling = reader.get("rope_scaling") if scaled else None
    parameters = reader.get("rope_parameters") or {}
    if layer_type is None:
        return ("rope_scaling", dict(scaling)) if scaling else ("rope_parameters", dict(parameters))
    if any(not isinstance(value, Mapping | None) for value in parameters.values()):
        reader.problem(f"rope_parameters must be by layer type; got {sorted(parameters)}")
        parameters = {}
    name = "rope_scaling" if scaling else f"rope_parameters.{layer_type}"
    return name, {**(parameters.get(layer_type) or {}), **(scaling or {})}


def _read_scaling(reader: ConfigReader, name: str, kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    keys, original = _SCALING_KEYS[kind], rope["original_max_position_embeddings"]
    if kind in ("yarn", "longrope") and rope.get("factor") is None and original:
        rope["factor"] = reader.integer("max_position_embeddings") / original
    if kind == "yarn":
        if not isinstance(rope.get("truncate", True), bool | None):
            reader.problem(f"{name}.truncate must be true or false; got {rope['truncate']!r}")
        rope["attention_factor"] = _yarn_attention_factor(rope)
        rope["beta_fast"] = rope.get("beta_fast") or 32.0
        rope["beta_slow"] = rope.get("beta_slow") or 1.0
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"}
    unknown = sorted(set(rope) - known - set(keys.values()) - {"original_max_position_embeddings"})
    if unknown:
        reader.problem(f"{name} of type {kind} must not hold {', '.join(unknown)}")
    scaling: dict[str, Any] = {"kind": kind}
    for ours, theirs in keys.items():
        value = rope.get(theirs)
        if theirs == "truncate":
            if value is False:  # else it is the default
                scaling[ours] = value
        elif ours in ("short_factors", "long_factors"):
            if not isinstance(value, list) or not value:
                reader.problem(f"{name}.{theirs} must be a list of positive numbers; got {value!r}")
                value = [1.0]
            scaling[ours] = [reader.positive(f"{name}.{theirs}", each) for each in value]
        elif value is not None or theirs != "attention_factor":
            scaling[ours] = reader.positive(f"{name}.{theirs}", value)
    if kind == "dynamic":
        scaling["original_length"] = reader.integer("max_position_embeddings")
    elif "original_length" in scaling:
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


def _written(scaling: RopeScaling) -> dict[str, Any]:
    """longrope of a length beyond the original one has its long factors whatever the input's length."""
    written: dict[str, Any] = {"rope_type": scaling.kind}
    for ours, theirs in _SCALING_KEYS[scaling.kind].items():
        value = getattr(scaling, "long_factors" if ours == "short_factors" and scaling.long else ours)
        if isinstance(value, tuple):
            value = list(value)
        if value is None and ours not in _OPTIONAL:
            value = scaling.setting(ours)
        if value is not None:
            written[theirs] = value
    return written
