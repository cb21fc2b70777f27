"""Layer rules: how config.json says which of the mixers of a family each layer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import ConfigReader, ConfigWriter

FULL, WINDOW = "full", "window"  # names of mixers, in `Family.mixers` and in the pattern of a model
_LAYER_TYPES = {"full_attention": FULL, "sliding_attention": WINDOW}  # by transformers' names


class LayerRule:
    """`read` returns the name of the mixer of each layer; `write` is its inverse."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        raise NotImplementedError

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        raise NotImplementedError


class NoWindows(LayerRule):
    """No layer has a window."""

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        return _layer_types(reader, depth, "full_attention") or [FULL] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        pass


@dataclass(frozen=True)
class OneWindow(LayerRule):
    """All layers have the window `sliding_window`, or none where it is null. absent: the window without the key."""

    absent: int | None = None

    def read(self, reader: ConfigReader, depth: int) -> list[str]:
        kind = "full_attention" if reader.get("sliding_window", self.absent) is None else "sliding_attention"
        return _layer_types(reader, depth, kind) or [_LAYER_TYPES[kind]] * depth

    def write(self, writer: ConfigWriter, layers: Sequence[str]) -> None:
        if WINDOW not in layers:
            writer.config["sliding_window"] = None
        elif FULL in layers:
            writer.problems.append("a window in some layers, which must be in all or none")


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
        layers = _layer_types(reader, depth, *_LAYER_TYPES)
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


def _layer_types(reader: ConfigReader, depth: int, *known: str) -> list[str] | None:
    """The mixers by the key `layer_types`, which may hold `known` values; None without the key."""
    kinds = reader.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != depth or not set(kinds) <= set(known):
        reader.problem(f"layer_types must name one of {', '.join(known)} for each of {depth} layers; got {kinds!r}")
        return [FULL] * depth
    return [_LAYER_TYPES[kind] for kind in kinds]
