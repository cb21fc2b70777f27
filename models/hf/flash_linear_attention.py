"""Components of flash-linear-attention's models: attention in some layers, sizes by ratios, mixers of a delta rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..mixers.delta.gated_deltanet import GatedDeltaNet
from .components import ATTENTION, BLOCK, GATED_MLP, MODEL, Component
from .config import ConfigReader, ConfigWriter
from .family import Family, renamed
from .fields import Field, Fixed, Flag, Integer, Number, Unread
from .layers import DENSE, FULL, LINEAR, WINDOW, Every, LayerRule, Numbered
from .rope import RopeBase
from .rules import Absent, Known, Only, Rule
from .tensors import Weight, convolution

_KINDS = (FULL, WINDOW)  # of attention; the keys of each are `attn.full.…` and `attn.window.…` in a table


@dataclass(frozen=True)
class Expanded(Field):
    """A size of which `key` gives the ratio to another key, over the number of heads where `heads` is a key too."""

    key: str
    size: str = "hidden_size"
    heads: str | None = "num_heads"

    def read(self, reader: ConfigReader) -> int:
        size, ratio = reader.integer(self.size), reader.number(self.key, 1.0)
        heads = 1 if self.heads is None else reader.integer(self.heads)
        expanded = size * ratio / heads
        if not math.isclose(expanded, round(expanded)) or expanded < 0.5:
            over = f" / {self.heads}" if self.heads else ""
            reader.problem(f"{self.key} must make {self.size} * {self.key}{over} an integer; got {ratio:g}")
        return max(1, round(expanded))

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        size, heads = writer.config.get(self.size), 1 if self.heads is None else writer.config.get(self.heads)
        if size and heads:
            ratio = value * heads / size
            exact = int(size * ratio) == value * heads
            writer.put(self.key, ratio if exact else math.nextafter(ratio, math.inf), setting)


@dataclass(frozen=True)
class Hidden(Field):
    """`intermediate_size`; without it a part of `hidden_ratio` (default where it is null) times `hidden_size`, rounded
    up to a multiple.
    """

    default: float = 4
    part: tuple[int, int] = (2, 3)
    multiple: int = 256

    def read(self, reader: ConfigReader) -> int:
        width, ratio = reader.integer("hidden_size"), reader.number("hidden_ratio", self.default)
        if reader.get("intermediate_size") is not None:
            return reader.integer("intermediate_size")
        numerator, denominator = self.part
        return self.multiple * -(-int(width * ratio * numerator / denominator) // self.multiple)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("intermediate_size", value, setting)


@dataclass(frozen=True)
class PerHead(Field):
    """`hidden_size` over the number of heads, a key: no other size is expressed."""

    heads: str

    def read(self, reader: ConfigReader) -> int:
        width, heads = reader.integer("hidden_size"), reader.integer(self.heads)
        if width % heads:
            reader.problem(f"{self.heads} must divide hidden_size = {width}; got {heads}")
        return max(1, width // heads)

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        width, heads = writer.config.get("hidden_size"), writer.config.get(self.heads)
        if width and heads and value * heads != width:
            writer.refuse(setting, value, f", which must be hidden_size / {self.heads}")


class Taps(Field):
    """`conv_size` where `use_short_conv` says so, else None."""

    def read(self, reader: ConfigReader) -> int | None:
        size = reader.integer("conv_size", 4)
        return size if reader.flag("use_short_conv") else None

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("use_short_conv", value is not None, setting)
        if value is not None:
            writer.put("conv_size", value, setting)


class ValueHeads(Field):
    """`num_v_heads`, a multiple of `num_heads`, by default as many."""

    def read(self, reader: ConfigReader) -> int:
        shared = reader.integer("num_heads")
        heads = reader.integer("num_v_heads", shared)
        if heads % shared:
            reader.problem(f"num_v_heads must be a multiple of num_heads = {shared}; got {heads}")
        return heads

    def write(self, writer: ConfigWriter, setting: str, value: Any) -> None:
        writer.put("num_v_heads", value, setting)


@dataclass(frozen=True)
class AttentionIn(LayerRule):
    """The mixer `native`, but softmax attention in the layers that `attn` lists, with a window or without."""

    native: str

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        if (said := reader.get("attn")) is not None:
            reader.problem(
                "attn must be null, the settings of attention with its layers, or a list of two of these, one of them "
                f"with a window_size; got {said!r}"
            )
        full, window = (rule.read(reader, depth) for rule in self._rules())
        if both := [layer for layer in range(depth) if self.native not in (full[layer], window[layer])]:
            reader.problem(f"attn must name each layer once; got {both} twice")
        return [one if one != self.native else other for one, other in zip(full, window, strict=True)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        if self.native not in layers:
            writer.problems.append("attention in all layers, of which one must have another mixer")
        for rule in self._rules():
            rule.write(writer, layers)

    def _rules(self) -> list[Numbered]:
        return [Numbered(f"attn.{kind}.layers", kind, self.native) for kind in _KINDS]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of attention as keys of their own; `attn` as it is where they are not of the expected form."""
    said = config.get("attn")
    each = [said] if isinstance(said, Mapping) else said or []
    if not isinstance(each, list) or not all(isinstance(settings, Mapping) for settings in each):
        return dict(config)
    kinds = [FULL if settings.get("window_size") is None else WINDOW for settings in each]
    if len(set(kinds)) < len(kinds):
        return dict(config)
    flat = {key: value for key, value in config.items() if key != "attn"}
    for kind, settings in zip(kinds, each, strict=True):
        flat |= {f"attn.{kind}.{key}": value for key, value in settings.items() if value is not None}
    return flat


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    prefixes = {kind: f"attn.{kind}." for kind in _KINDS}
    whole = {key: value for key, value in config.items() if not key.startswith(tuple(prefixes.values()))}
    each = [
        {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        for prefix in prefixes.values()
    ]
    used = [settings for settings in each if settings.get("layers")]
    return {**whole, "attn": used if len(used) > 1 else next(iter(used), None)}


def attention(prefix: str = "", **fields: Field) -> Component:
    """Softmax attention whose keys begin with `prefix`."""
    heads = f"{prefix}num_heads"
    return ATTENTION.moved("self_attn.", "attn.").but(
        heads=Integer(heads),
        kv_heads=Integer(f"{prefix}num_kv_heads", heads, divides=heads),
        head_dim=PerHead(heads),
        bias=Flag(f"{prefix}qkv_bias"),
        rope_scaling=Fixed(None),
        **{"rope_base": RopeBase(key=f"{prefix}rope_theta"), **fields},
    )


def with_sizes(key_dim: float = 1.0, value_dim: float = 1.0) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A `resolve` for mixers whose heads have these parts of width / heads by default."""

    def resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        resolved = dict(arguments)
        for name, part in (("key_dim", key_dim), ("value_dim", value_dim)):
            if resolved[name] is None:
                resolved[name] = int(resolved["width"] * part) // resolved["heads"]
        for name in ("key_heads", "kv_heads"):
            if name in resolved and resolved[name] is None:
                resolved[name] = resolved["heads"]
        return resolved

    return resolve


def projections(**letters: str) -> dict[str, str | Weight]:
    """The names of our linear layers by theirs, which have a letter each."""
    return {name: f"attn.{letter}_proj" for name, letter in letters.items()}


def short_convolution(*names: str) -> Weight:
    """Of convolutions of the layers q, k and v, or of others by their letters, the weights."""
    return convolution("attn.{}_conv1d.weight", names or ("q", "k", "v"), sizes=_outputs)


def _outputs(mixer: Any) -> list[int]:
    return [layer.weight.shape[0] for layer in (mixer.query, mixer.key, mixer.value)]


def flash_linear_attention(
    model_type: str,
    architecture: str,
    mixer: Component,
    *,
    defaults: Mapping[str, Any],
    rules: tuple[Rule, ...] = (),
    rename: Mapping[str, str] | None = None,
    alone: bool = False,
    **more: Any,
) -> Family:
    """The family of a model whose layers have the mixer, but for those with softmax attention.

    defaults: of keys that a config.json may leave out. rules: beside those of all these families. rename: keys by other
    names that they have had. alone: whether no layer can have attention instead. more: what else `Family` takes.
    """
    known = {"hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, "hidden_ratio": 4, **defaults}
    by_name = renamed(**(rename or {}))

    def current(config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**known, **by_name(config if alone else _flat(config))}

    settings: dict[str, Any] = {
        "mixers": {LINEAR: mixer},
        "layers": Every(LINEAR),
        "feed_forwards": {DENSE: FLA_MLP},
        "block": FLA_BLOCK,
        "model": FLA_MODEL,
        "current": current,
        "library": "flash-linear-attention",
        "yields_to": ("llama", "mistral", "qwen2", "qwen3", "transformer"),  # with attention in all layers
    }
    if not alone:
        full = attention("attn.full.", window=Fixed(None))
        window = attention("attn.window.", window=Integer("attn.window.window_size"))
        settings["mixers"] |= {FULL: full, WINDOW: window}
        settings |= {"layers": AttentionIn(LINEAR), "written": _nested}
    return Family(model_type, architecture, rules=(*rules, *FLA_RULES), **{**settings, **more})


FLA_MODEL = MODEL.but(norm_eps=Number("norm_eps", 1e-6), names={"embedding": "model.embeddings"})
FLA_BLOCK = BLOCK.but(norm_eps=Unread("norm_eps"), names={"mixer_norm": "attn_norm", "feed_forward_norm": "mlp_norm"})
FLA_MLP = GATED_MLP.but(hidden=Hidden())
FLA_RULES: tuple[Rule, ...] = (
    Absent("quantization_config", "Save the model dequantised"),
    Absent("attnres_block_size", "Attention over residuals is another block here"),
    Known(("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
           "hidden_ratio", "conv_size")),
)  # fmt: skip
SWISH = Only("hidden_act", ("swish", "silu"))
AFFINE = Only("elementwise_affine", (True,))
# Our bounds of all layers are those of the first layer that has them; theirs are the model's.
LOWER_BOUNDS = Weight("model.lower_bounds", of_layer=False)
DELTA = Component(
    GatedDeltaNet,
    {
        "heads": Integer("num_heads"),
        "key_heads": Unread("num_heads"),
        "key_dim": Expanded("expand_k"),
        "value_dim": Expanded("expand_v"),
        "conv_size": Taps(),
        "negative_eigenvalues": Flag("allow_neg_eigval"),
        "norm_eps": Unread("norm_eps"),
        "gate": Flag("use_gate"),
        "decay": Fixed(False),
    },
    {
        **projections(query="q", key="k", value="v", beta="b", gate="g", output="o"),
        "conv.weight": short_convolution(),
        "norm": "attn.o_norm",
    },
    with_sizes(),
)
