"""Layer rules: how config.json says which of the parts of a family each layer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import ConfigReader, ConfigWriter

# Names of mixers and feed-forward layers, in the tables of a family and in the pattern of a model.
FULL, WINDOW, LINEAR = "full", "window", "linear"
DENSE, EXPERTS = "dense", "experts"
_LAYER_TYPES = {"full_attention": FULL, "sliding_attention": WINDOW}  # by transformers' names


class LayerRule:
    """`read` returns the name of the part of each layer; `write` is its inverse."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        raise NotImplementedError

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Every(LayerRule):
    """All layers have the part of this name."""

    name: str

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        return [self.name] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        if others := sorted(set(layers) - {self.name}):
            writer.problems.append(f"{', '.join(others)} in some layers, which must all have {self.name}")


@dataclass(frozen=True)
class EveryOf(LayerRule):
    """All layers have the first of these parts, and are written alike whichever they have."""

    names: tuple[str, ...]

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        return [self.names[0]] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        pass


class NoWindows(LayerRule):
    """No layer has a window."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        return _layer_types(reader, depth, {"full_attention": FULL}) or [FULL] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        pass


@dataclass(frozen=True)
class OneWindow(LayerRule):
    """All layers have the window `sliding_window`, or none where it is null. absent: the window without the key.

    switch: a key that must be true for there to be windows.
    """

    absent: int | None = None
    switch: str | None = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        used = self.switch is None or reader.flag(self.switch)
        window = reader.get("sliding_window", self.absent) if used else None
        kind = "full_attention" if window is None else "sliding_attention"
        name = _LAYER_TYPES[kind]
        return _layer_types(reader, depth, {kind: name}) or [name] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        if self.switch is not None:
            writer.config[self.switch] = WINDOW in layers
        if WINDOW not in layers:
            writer.config["sliding_window"] = None
        elif FULL in layers:
            writer.problems.append("a window in some layers, which must be in all or none")


@dataclass(frozen=True)
class WhereNull(LayerRule):
    """All layers have the part `null` where the key is null, else `given`; `absent`: its value without the key."""

    key: str
    null: str
    given: str
    absent: int | None = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        return [self.null if reader.get(self.key, self.absent) is None else self.given] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        if self.null in layers:
            writer.config[self.key] = None
            if self.given in layers:
                writer.problems.append(f"{self.key} in some layers, which must be in all or none")


@dataclass(frozen=True)
class SwitchedWindows(LayerRule):
    """Windows where `use_sliding_window` is true: in the layers that `layer_types` names, or, without that key, from
    the layer `max_window_layers` on.

    absent, first: `sliding_window` and `max_window_layers` without their keys.
    """

    absent: int
    first: int

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        used = reader.flag("use_sliding_window")
        window, first = reader.get("sliding_window", self.absent), reader.get("max_window_layers")
        first = self.first if first is None else first
        if not isinstance(first, int):
            reader.problem(f"max_window_layers must be an integer; got {first!r}")
            first = self.first
        layers = _layer_types(reader, depth, _LAYER_TYPES)
        if layers is None:
            return [WINDOW if used and window is not None and layer >= first else FULL for layer in range(depth)]
        if WINDOW in layers and not used:
            reader.problem(
                "layer_types must be all full_attention unless use_sliding_window is true; got sliding_attention"
            )
        return layers

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        full = [layer for layer, name in enumerate(layers) if name == FULL]
        theirs = {ours: kind for kind, ours in _LAYER_TYPES.items()}
        writer.config["use_sliding_window"] = WINDOW in layers
        writer.config.setdefault("sliding_window", None)
        # Windows begin here for versions of transformers that do not know layer_types.
        writer.config["max_window_layers"] = full[-1] + 1 if full else 0
        writer.config["layer_types"] = [theirs[name] for name in layers]


@dataclass(frozen=True)
class LayerTypes(LayerRule):
    """A key that names the part of each layer. kinds: our names by theirs.

    default: the layers without the key, of the reader and the depth; None where there must be the key.
    """

    default: Callable[[ConfigReader, int], list[str]] | None = None
    kinds: Mapping[str, str] = field(default_factory=lambda: _LAYER_TYPES)
    key: str = "layer_types"

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        layers = _layer_types(reader, depth, self.kinds, self.key)
        if layers is None and self.default is None:
            reader.problem(f"{self.key} must name one of {', '.join(self.kinds)} for each layer; got none")
        other = next(iter(self.kinds.values()))
        return layers or (self.default(reader, depth) if self.default else [other] * depth)

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        theirs = {ours: kind for kind, ours in self.kinds.items()}
        writer.config[self.key] = [theirs[name] for name in layers]


@dataclass(frozen=True)
class Tiled(LayerRule):
    """A key that names the part of some layers, and of all by repetition. kinds: our names by theirs.

    default: the names without the key.
    """

    key: str
    kinds: Mapping[str, str]
    default: tuple[str, ...]

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        named = reader.get(self.key, self.default)
        if not isinstance(named, list | tuple) or not named or not all(kind in self.kinds for kind in named):
            reader.problem(f"{self.key} must list {' and '.join(self.kinds)}; got {named!r}")
            named = self.default
        return [self.kinds[named[layer % len(named)]] for layer in range(depth)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        theirs = {ours: kind for kind, ours in self.kinds.items()}
        named = [theirs[name] for name in layers]
        periods = range(1, len(named) + 1)
        period = next(n for n in periods if all(kind == named[layer % n] for layer, kind in enumerate(named)))
        writer.config[self.key] = named[:period]


def every_nth_full(
    n: int, key: str | None = None, other: str = WINDOW, full: str = FULL
) -> Callable[[ConfigReader, int], list[str]]:
    """`full` in every n-th layer, `other` in the rest; `key` may give another n: a default of `LayerTypes`."""

    def layers(reader: ConfigReader, depth: int) -> list[str]:
        step = n if key is None else reader.integer(key, n)
        return [full if (layer + 1) % step == 0 else other for layer in range(depth)]

    return layers


@dataclass(frozen=True)
class ByPositions(LayerRule):
    """`no_rope_layers` has a 1 for layers with positions; where none are listed, each n-th has none.

    names: of parts, by a kind of `layer_types` and by whether there are positions. kinds: of these by theirs.
    kind: of a layer where `layer_types` does not say, by whether it has positions.
    """

    names: Mapping[tuple[str, bool], str]
    kinds: Mapping[str, str]
    kind: Callable[[ConfigReader, bool], str]

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        every, placed = reader.integer("no_rope_layer_interval", 4), reader.get("no_rope_layers")
        placed = placed or [int((layer + 1) % every != 0) for layer in range(depth)]
        if not isinstance(placed, list) or len(placed) < depth or not set(placed) <= {0, 1}:
            reader.problem(f"no_rope_layers must have a 0 or 1 for each of {depth} layers; got {placed!r}")
            placed = [1] * depth
        kinds = LayerTypes(lambda *_: [self.kind(reader, bool(each)) for each in placed[:depth]], self.kinds)
        return [self.names[kind, bool(each)] for kind, each in zip(kinds.read(reader, depth), placed, strict=False)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        known = {name: each for each, name in self.names.items()}
        LayerTypes(kinds=self.kinds).write(writer, [known[name][0] for name in layers])
        writer.config["no_rope_layers"] = [int(known[name][1]) for name in layers]


@dataclass(frozen=True)
class Periodic(LayerRule):
    """The part `name` in the layers whose number is `offset` modulo `period`, both keys, `other` in the rest.

    defaults: of period and offset. count: a key whose value 1 stands for `other` in all layers.
    """

    period: str
    offset: str
    name: str
    other: str
    defaults: tuple[int, int]
    count: str | None = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        period = reader.integer(self.period, self.defaults[0])
        offset = reader.get(self.offset, self.defaults[1])
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < period:
            reader.problem(f"{self.offset} must be an integer of 0 … {self.period} - 1; got {offset!r}")
        if self.count is not None and reader.get(self.count) == 1:
            return [self.other] * depth
        return [self.name if layer % period == offset else self.other for layer in range(depth)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        depth, found = len(layers), [layer for layer, name in enumerate(layers) if name == self.name]
        offset = found[0] if found else depth
        period = found[1] - found[0] if len(found) > 1 else depth + 1
        writer.config |= {self.period: period, self.offset: offset}
        if offset >= period or found != [layer for layer in range(depth) if layer % period == offset]:
            writer.problems.append(f"{self.name} in layers that {self.period} and {self.offset} do not give")


@dataclass(frozen=True)
class Numbered(LayerRule):
    """The part `name` in the layers that a key lists, `other` in the rest.

    step: a key whose value n, by default 1, stands for the last of each n layers where none are listed.
    """

    key: str
    name: str
    other: str
    step: str | None = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        listed = reader.get(self.key)
        if listed is None and self.step is not None:
            step = reader.integer(self.step, 1)
            listed = list(range(step - 1, depth, step))
        listed = listed or []
        if not isinstance(listed, list) or not all(isinstance(layer, int) and 0 <= layer < depth for layer in listed):
            reader.problem(f"{self.key} must list layers of 0 … {depth - 1}; got {listed!r}")
            listed = []
        return [self.name if layer in listed else self.other for layer in range(depth)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        writer.config[self.key] = [layer for layer, name in enumerate(layers) if name == self.name]


@dataclass(frozen=True)
class Switched(LayerRule):
    """The layers of another rule, in which a part has another name where the key has this value.

    names: (name of the rule, the other name). absent: the value without the key.
    """

    rule: LayerRule
    key: str
    value: Any
    names: tuple[str, str]
    absent: Any = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        layers, (name, other) = self.rule.read(reader, depth), self.names
        if reader.get(self.key, self.absent) != self.value:
            return layers
        return [other if layer == name else layer for layer in layers]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        name, other = self.names
        if other in layers and (writer.config.setdefault(self.key, self.value) != self.value or name in layers):
            writer.problems.append(f"{self.key} in some layers, which must be in all or none")
        self.rule.write(writer, [name if layer == other else layer for layer in layers])


@dataclass(frozen=True)
class ExpertsFrom(LayerRule):
    """Experts in the layers from `key` on; `absent` without it."""

    key: str
    absent: int

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        first = reader.get(self.key)
        first = self.absent if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            reader.problem(f"{self.key} must be an integer that is not negative; got {first!r}")
            first = self.absent
        return [DENSE if layer < first else EXPERTS for layer in range(depth)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        first = layers.index(EXPERTS) if EXPERTS in layers else len(layers)
        writer.config[self.key] = first
        if DENSE in layers[first:]:
            writer.problems.append("a dense feed-forward layer after experts, which must be in all later layers")


class ExpertsBut(LayerRule):
    """Experts in every layer whose number, from 1, `decoder_sparse_step` divides, but not in `mlp_only_layers`."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        step, dense = reader.integer("decoder_sparse_step", 1), reader.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
            reader.problem(f"mlp_only_layers must be a list of layers; got {dense!r}")
            dense = []
        return [DENSE if (layer + 1) % step or layer in dense else EXPERTS for layer in range(depth)]

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        writer.config["decoder_sparse_step"] = 1
        writer.config["mlp_only_layers"] = [layer for layer, name in enumerate(layers) if name == DENSE]


def _layer_types(
    reader: ConfigReader, depth: int, kinds: Mapping[str, str], key: str = "layer_types"
) -> list[str] | None:
    """Our names by the key, whose values must be among `kinds`; None without the key."""
    named = reader.get(key)
    if named is None:
        return None
    if not isinstance(named, list) or len(named) != depth or not all(kind in kinds for kind in named):
        reader.problem(f"{key} must name one of {', '.join(kinds)} for each of {depth} layers; got {named!r}")
        return [next(iter(kinds.values()))] * depth
    return [kinds[kind] for kind in named]
