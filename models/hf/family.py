"""Family: a kind of Hugging Face model as a table, and the conversions that follow from the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..language_model import expand_pattern
from .components import BLOCK, GATED_MLP, MODEL, Component, Node, Settings, built, path_of
from .config import ConfigReader, ConfigWriter
from .fields import Absent, Only, Rule
from .layers import LayerRule, NoWindows
from .tensors import Tensors

LEFT_OUT = ("multi_token_prediction.",)  # what training alone uses

RULES: tuple[Rule, ...] = (
    Only("hidden_act", ("silu", "swish")),
    Only("attention_dropout", (0.0, 0)),
    Absent("quantization_config", "Save the model dequantised"),
    Absent("rope_interleaved", "Rotary pairs are half-split here"),
)


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`; each file of `families/` declares one as `FAMILY`.

    architecture: transformers' class of the model.
    mixers, layers: the mixers by name, and the rule that says which of them each layer has.
    feed_forward, block, model: the other components. rules: for keys of config.json that belong to no setting.
    yields_to: model types to write instead, where they express a model too.
    prefix: the beginning of the names of a layer's tensors.
    ignored: endings of the names of tensors that hold nothing learned.
    """

    model_type: str
    architecture: str
    mixers: Mapping[str, Component]
    layers: LayerRule = field(default_factory=NoWindows)
    feed_forward: Component = GATED_MLP
    block: Component = BLOCK
    model: Component = MODEL
    rules: tuple[Rule, ...] = RULES
    yields_to: tuple[str, ...] = ()
    prefix: str = "model.layers.{layer}."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """The settings of the `LanguageModel` that a config.json describes, nested dicts as in `conf/model`.

        Raises one ValueError that names every key whose value is not supported.
        """
        reader = ConfigReader(config)
        result = self.model.read(reader)
        del result["_partial_"]
        layers = self.layers.read(reader, result["depth"])
        result["pattern"] = _run_lengths(layers)
        result["mixers"] = {name: self.mixers[name].read(reader) for name in dict.fromkeys(layers)}
        result["feed_forward"] = self.feed_forward.read(reader)
        if self.block.target is not BLOCK.target:  # the model's default
            result["block"] = self.block.read(reader)
        for rule in self.rules:
            rule.read(reader)
        reader.finish()
        return result

    def config(self, settings: Settings) -> ConfigWriter:
        """The config.json of a model with these settings; its `problems` are those that the family cannot express."""
        writer = ConfigWriter({"architectures": [self.architecture], "model_type": self.model_type})
        model = Node.of(settings)
        self.model.write(writer, "model", model)
        if model.target is not self.model.target:
            return writer  # it may have no parts by these names
        block = model.arguments["block"] or {"_target_": path_of(BLOCK.target)}
        self.block.write(writer, "model.block", _part(model, block))
        mixers = {name: _part(model, settings) for name, settings in model.arguments["mixers"].items()}
        kinds = {name: self._kind(mixer) for name, mixer in mixers.items()}
        for name, mixer in mixers.items():
            self.mixers[kinds[name]].write(writer, f"model.mixers.{name}", mixer)
        if model.arguments["feed_forward"] is None:
            writer.refuse("model.feed_forward", None)
        else:
            self.feed_forward.write(writer, "model.feed_forward", _part(model, model.arguments["feed_forward"]))
        layers = _mixer_names(model)
        if joined := sorted(set(layers) - set(kinds)):  # several mixers in one layer
            writer.refuse("model.pattern", joined)
        else:
            self.layers.write(writer, [kinds[name] for name in layers])
        for rule in self.rules:
            rule.write(writer)
        return writer

    def tensors(self, settings: Settings) -> Tensors:
        """The names of the tensors on both sides, for settings that this family expresses."""
        with torch.device("meta"):
            module: nn.Module = built(settings)
        model = Node.of(settings)
        kinds = {name: self._kind(_part(model, mixer)) for name, mixer in model.arguments["mixers"].items()}
        layers = [self.mixers[kinds[name]] for name in _mixer_names(model)]
        names, duplicates = {}, {}
        first_names: dict[nn.Parameter, str] = {}
        for ours, parameter in module.named_parameters(remove_duplicate=False):
            if ours.startswith(LEFT_OUT):
                continue
            theirs = self._their_name(ours, layers)
            if parameter in first_names:
                duplicates[theirs] = first_names[parameter]
            else:
                names[ours] = first_names[parameter] = theirs
        return Tensors.renamed(names, duplicates=duplicates, ignored=self.ignored, left_out=LEFT_OUT)

    def _their_name(self, ours: str, mixers: list[Component]) -> str:
        """transformers' name of our parameter; `mixers` are those of the layers."""
        if not ours.startswith("blocks."):
            return self.model.their_name(ours)
        _, layer, part, rest = ours.split(".", 3)
        parts = {"mixer": mixers[int(layer)], "feed_forward": self.feed_forward}
        name = parts[part].their_name(rest) if part in parts else self.block.their_name(f"{part}.{rest}")
        return self.prefix.format(layer=layer) + name

    def _kind(self, node: Node) -> str:
        """The name in `self.mixers` of the component that expresses this mixer, or lacks least."""

        def distance(name: str) -> tuple[bool, int]:
            writer = ConfigWriter()
            self.mixers[name].write(writer, "", node)
            return self.mixers[name].target is not node.target, len(writer.problems)

        return min(self.mixers, key=distance)


def _part(model: Node, settings: Settings) -> Node:
    """A part of the model, with the arguments that it has from the model."""
    return Node.of(settings, width=model.arguments["width"], norm_eps=model.arguments["norm_eps"])


def _mixer_names(model: Node) -> list[str]:
    """For each layer, the name of its mixer in the settings."""
    return expand_pattern(model.arguments["pattern"], model.arguments["depth"], list(model.arguments["mixers"]))


def _run_lengths(layers: list[str]) -> list[str]:
    """['full', 'full', 'window'] as a pattern: ['full*2', 'window']; ['full'] where all layers are alike."""
    if len(set(layers)) == 1:
        return layers[:1]
    runs = [(name, len(list(same))) for name, same in groupby(layers)]
    return [name if count == 1 else f"{name}*{count}" for name, count in runs]
