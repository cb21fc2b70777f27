"""Family: one kind of Hugging Face model as a table, and what follows from it in both directions."""

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
from .layers import AllFull, LayerRule
from .tensors import Tensors

RULES: tuple[Rule, ...] = (
    Only("hidden_act", ("silu", "swish")),
    Only("attention_dropout", (0.0, 0)),
    Absent("quantization_config", "Save the model dequantised"),
    Absent("rope_interleaved", "Rotary pairs are half-split here"),
)


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`; each file of `families/` declares one as `FAMILY`.

    model_type, architecture: config.json's key, and transformers' class of the model.
    mixers: the component of each kind of layer, by a name of which `layers` tells the layers that have it.
    rules: what else holds of a config.json. yields_to: model types that are preferred where they express a model too.
    prefix: what the names of a layer's tensors begin with. ignored: ends of names that hold nothing that was learned.
    """

    model_type: str
    architecture: str
    mixers: Mapping[str, Component]
    layers: LayerRule = field(default_factory=AllFull)
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
        result = {**self.model.read(reader)}
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
        """The config.json of a model by its settings; with `problems` where this family cannot express them."""
        writer = ConfigWriter({"architectures": [self.architecture], "model_type": self.model_type})
        model = Node.of(settings)
        width = model.arguments.get("width", 0)
        self.model.write(writer, "model", model, width)
        if writer.problems and model.target is not self.model.target:
            return writer  # whose parts are its own
        block = model.arguments["block"] or {"_target_": path_of(BLOCK.target)}
        self.block.write(writer, "model.block", self._part(model, block), width)
        kinds = {}
        for name, node in model.arguments["mixers"].items():
            kinds[name] = self._kind(model, node)
            self.mixers[kinds[name]].write(writer, f"model.mixers.{name}", self._part(model, node), width)
        self.feed_forward.write(writer, "model.feed_forward", self._part(model, model.arguments["feed_forward"]), width)
        self.layers.write(writer, [kinds[name] for name in self._names(model)])
        for rule in self.rules:
            rule.write(writer)
        return writer

    def tensors(self, settings: Settings) -> Tensors:
        """How the tensors of a model that this family expresses are named on both sides."""
        with torch.device("meta"):
            whole: nn.Module = built(settings)
        model = Node.of(settings)
        kinds = [self._kind(model, model.arguments["mixers"][name]) for name in self._names(model)]
        first: dict[nn.Parameter, str] = {}
        names, duplicates = {}, {}
        for ours, parameter in whole.named_parameters(remove_duplicate=False):
            theirs = self._their_name(ours, kinds)
            if parameter in first:
                duplicates[theirs] = first[parameter]
            else:
                names[ours] = first[parameter] = theirs
        return Tensors.renamed(names, duplicates=duplicates, ignored=self.ignored)

    def _their_name(self, ours: str, kinds: list[str]) -> str:
        if not ours.startswith("blocks."):
            return self.model.their_name(ours)
        _, layer, part, rest = ours.split(".", 3)
        parts = {"mixer": self.mixers[kinds[int(layer)]], "feed_forward": self.feed_forward}
        name = parts[part].their_name(rest) if part in parts else self.block.their_name(f"{part}.{rest}")
        return self.prefix.format(layer=layer) + name

    def _kind(self, model: Node, mixer: Settings) -> str:
        """The name of the family's mixer that expresses this one of the settings, or comes nearest."""
        node = self._part(model, mixer)

        def distance(name: str) -> tuple[bool, int]:
            writer = ConfigWriter()
            self.mixers[name].write(writer, "", node, model.arguments["width"])
            return self.mixers[name].target is not node.target, len(writer.problems)

        return min(self.mixers, key=distance)

    @staticmethod
    def _part(model: Node, settings: Settings) -> Node:
        return Node.of(settings, norm_eps=model.arguments["norm_eps"])

    @staticmethod
    def _names(model: Node) -> list[str]:
        """The mixer of each layer by its name in the settings."""
        return expand_pattern(model.arguments["pattern"], model.arguments["depth"], list(model.arguments["mixers"]))


def _run_lengths(layers: list[str]) -> list[str]:
    """['full', 'full', 'window'] as a pattern: ['full*2', 'window']; ['full'] where all layers are alike."""
    if len(set(layers)) == 1:
        return layers[:1]
    runs = [(name, len(list(same))) for name, same in groupby(layers)]
    return [name if count == 1 else f"{name}*{count}" for name, count in runs]
