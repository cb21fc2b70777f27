"""Family: a kind of Hugging Face model as a table, and the conversions that follow from the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..block import Block, SideBySide
from ..pattern import expand_pattern, run_lengths, stages
from .components import BLOCK, GATED_MLP, MODEL, Component, Node, Settings, built, path_of
from .config import ConfigReader, ConfigWriter
from .layers import DENSE, Every, LayerRule, NoWindows
from .rules import Absent, Only, Rule
from .tensors import Placed, Tensors, Weight

# Of models of more than text: how their language model's tensors are named, and what is not read.
LANGUAGE_MODEL = ((r"^model\.language_model\.", "model."), (r"^language_model\.", ""))
OTHER_MODELS = r"^(model\.)?(vision_model|vision_tower|visual|multi_modal_projector|audio_tower)\."
LEFT_OUT = ("multi_token_prediction.",)  # what training alone uses
FEED_FORWARD = "feed_forward"
# Of each part by its name in the settings: the components that it may be, and the name of that which it is.
Kinds = Mapping[str, tuple[Mapping[str, Component], str | None]]

RULES: tuple[Rule, ...] = (
    Only("hidden_act", ("silu", "swish")),
    Only("attention_dropout", (0.0, 0)),
    Absent("quantization_config", "Save the model dequantised"),
    Absent("rope_interleaved", "Rotary pairs are half-split here"),
)


class Layer(NamedTuple):
    """The settings' names of the parts of one layer: of its mixer, or of those side by side, and of what follows.

    A feed-forward layer that all have is `feed_forward`.
    """

    mixers: tuple[str, ...]
    feed_forward: str | None


def _as_it_is(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config


def renamed(**names: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A `current` of families of which some keys have had other names: the table's by the other ones."""

    def current(config: Mapping[str, Any]) -> Mapping[str, Any]:
        known = {key: value for key, value in config.items() if key not in names}
        return {names[key]: value for key, value in config.items() if key in names} | known

    return current


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`; each file of `families/` declares one as `FAMILY`.

    architecture: the class of the model. library: whose it is.
    mixers, layers: the mixers by name, and the rule that says which of them each layer has: `a+b` has two side by side,
        `a|b|c` three in sequence, if the family is `in_sequence`. Where a name ends in `_1`, `_2` and so on there are
        several mixers of one kind.
    side_by_side: what joins these; None where no layer has several.
    feed_forwards, feed_forward_layers: the same of the feed-forward layers; none where blocks are a mixer alone.
    block, model: the other components. block_names: of the block's tensors, by the mixer of a layer, where layers have
        other names.
    rules: for keys of config.json that belong to no setting.
    within: model types of models of more than text, whose config.json has this family's as `text_config`.
    yields_to: model types to write instead, where they express a model too.
    prefix: the beginning of the names of a layer's tensors. moved: (before, after) of how they go on, by the mixers of
        a layer. `{use}` in them is the number of layers before with such mixers. Of layers that share their weights
        all have the tensors, adapters too, but only the first need have them in a checkpoint.
    ignored: regular expressions of the names of tensors that hold nothing learned, or nothing that is read.
    aliases: (regular expression, replacement) of names of tensors that other versions write.
    forms: (regular expression, table) of checkpoints in another form: one that has a tensor of such a name is read by
        that table.
    predicts: whether checkpoints hold layers after the last one, which predict further tokens and are not read.
    current: turns a config.json as the hub or older versions have it into the form that the table reads.
    written: turns that form into the one that is written.
    """

    model_type: str
    architecture: str
    mixers: Mapping[str, Component]
    layers: LayerRule = field(default_factory=NoWindows)
    feed_forwards: Mapping[str, Component] = field(default_factory=lambda: {DENSE: GATED_MLP})
    feed_forward_layers: LayerRule = field(default_factory=lambda: Every(DENSE))
    side_by_side: Component | None = None
    block: Component = BLOCK
    block_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    model: Component = MODEL
    rules: tuple[Rule, ...] = RULES
    within: tuple[str, ...] = ()
    yields_to: tuple[str, ...] = ()
    in_sequence: bool = False
    prefix: str = "model.layers.{layer}."
    moved: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    aliases: tuple[tuple[str, str], ...] = ()
    forms: tuple[tuple[str, Family], ...] = ()
    predicts: bool = False
    library: str = "transformers"
    current: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is
    written: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is

    @property
    def renamings(self) -> tuple[tuple[str, str], ...]:
        """(regular expression, replacement) of names of tensors in checkpoints."""
        return (*(LANGUAGE_MODEL if self.within else ()), *self.aliases)

    def in_form(self, names: Collection[str]) -> Family:
        """The table of the form that checkpoints with tensors of these names have."""
        found = (form for pattern, form in self.forms if any(re.search(pattern, name) for name in names))
        return next(found, self)

    def alone(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Of a model of more than text, that has such a language model: the config.json of that alone; else None."""
        text = config.get("text_config")
        if config.get("model_type") not in self.within or not isinstance(text, Mapping):
            return None
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        whole = {key: config[key] for key in ("torch_dtype", "dtype", "quantization_config") if key in config}
        tie = {} if tied is None else {"tie_word_embeddings": tied}
        return {**ids, **text, **whole, **tie, "model_type": self.model_type}

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """The settings of the `LanguageModel` that a config.json describes, nested dicts as in `conf/model`.

        Raises one ValueError that names every key whose value is not supported.
        """
        reader = ConfigReader(self.current(config))
        result = self.model.read(reader)
        del result["_partial_"]
        mixers = self.layers.read(reader, result["depth"])
        names = dict.fromkeys(name for together in mixers for name in re.split(r"[+|]", together))
        result["mixers"] = {name: self.mixers[re.sub(r"_\d+$", "", name)].read(reader) for name in names}
        following: list[str] = []
        if self.feed_forwards:
            following = self.feed_forward_layers.read(reader, result["depth"])
        read = {name: self.feed_forwards[name].read(reader) for name in dict.fromkeys(following)}
        if len(read) > 1:  # the pattern says which layer has which
            mixers = [f"{mixer}|{feed_forward}" for mixer, feed_forward in zip(mixers, following, strict=True)]
            result["mixers"] |= read
        result["feed_forward"] = next(iter(read.values())) if len(read) == 1 else None
        result["pattern"] = run_lengths(mixers)
        if self.side_by_side is not None:
            result["side_by_side"] = self.side_by_side.read(reader)
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
        if model.target is not self.model.target:  # it may have no parts by these names
            self.model.write(writer, "model", model)
            return writer
        layers, joined = self._layers(model)
        kinds = self._kinds(model, layers)
        writer.kinds = {name: kind for name, (_, kind) in kinds.items() if kind is not None}
        writer.layers = [layer.mixers for layer in layers]
        self.model.write(writer, "model", model)
        if joined:
            writer.refuse("model.pattern", joined)
        for setting, joins, default in (("block", self.block, Block), ("side_by_side", self.side_by_side, SideBySide)):
            if joins is not None:
                chosen = model.arguments[setting] or {"_target_": path_of(default)}
                joins.write(writer, f"model.{setting}", _part(model, chosen))
        for name, (components, kind) in kinds.items():
            setting = "model.feed_forward" if name == FEED_FORWARD else f"model.mixers.{name}"
            if kind is None:
                writer.refuse(setting, _parts(model)[name].target.__qualname__)
            else:
                components[kind].write(writer, setting, _parts(model)[name])
        following = [layer.feed_forward for layer in layers]
        if self.in_sequence and any(following):
            writer.refuse("model.feed_forward", model.arguments["feed_forward"])
        elif self.feed_forwards and None in following:
            writer.refuse("model.feed_forward", None)
        elif not joined and all(kind for _, kind in kinds.values()):
            self.layers.write(writer, [self._kind_of(layer, kinds) for layer in layers])
            if self.feed_forwards:
                self.feed_forward_layers.write(writer, [kinds[name][1] or "" for name in following if name])
        for rule in self.rules:
            rule.write(writer)
        return writer

    def tensors(self, settings: Settings) -> Tensors:
        """The places of the tensors on both sides, for settings that this family expresses."""
        with torch.device("meta"):
            module: nn.Module = built(settings)
        model = Node.of(settings)
        layers, _ = self._layers(model)
        kinds = self._kinds(model, layers)
        placed: list[Placed] = []
        duplicates: dict[str, str] = {}
        fixed: dict[str, float | None] = {}
        first_names: dict[torch.Tensor, str] = {}
        buffers = {name for name, _ in module.named_buffers()}
        for ours, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
            if ours.startswith(LEFT_OUT):
                continue
            component, path, name, owner = self._owner(ours, layers, kinds)
            if (weight := component.place(name)) is None:
                assert ours in buffers, f"{self.model_type} must say where {ours} is kept"
                fixed[ours] = component.fixed[name]
                continue
            names = self._names(ours, owner, weight, layers, kinds, model)
            if tensor not in first_names:
                first_names[tensor] = names[0]
                where = replace(weight, name=names[0])
                placed.append(Placed(ours, tensor.shape, module.get_submodule(path), where))
            duplicates.update((each, first_names[tensor]) for each in names if each != first_names[tensor])
        ignored = self.ignored + (self._ahead(model.arguments["depth"]) if self.predicts else ())
        ignored += (OTHER_MODELS,) if self.within else ()
        return Tensors.of(
            placed,
            duplicates=duplicates,
            ignored=ignored,
            left_out=LEFT_OUT,
            buffers=frozenset(buffers - set(fixed)),
            fixed=fixed,
        )

    def _owner(self, ours: str, layers: list[Layer], kinds: Kinds) -> tuple[Component, str, str, str | None]:
        """Of our parameter: the component, the path of its part, its name there, and the part's name, if any."""
        if not ours.startswith("blocks."):
            return self.model, "", ours, None
        _, number, part, rest = ours.split(".", 3)
        layer, path, owner = layers[int(number)], f"blocks.{number}.{part}", None
        # Parts in sequence are called by their numbers.
        called = part if self.in_sequence else part.replace("mixer_1", "mixer").replace("mixer_2", FEED_FORWARD)
        if self.in_sequence and (place := re.fullmatch(r"mixer(?:_(\d+))?", part)):
            owner = layer.mixers[int(place[1] or 1) - 1]
        elif called == "mixer" and len(layer.mixers) > 1:
            owner, rest = rest.split(".", 1)
            path = f"{path}.{owner}"
        elif called == "mixer":
            owner = next(iter(layer.mixers))
        elif called == FEED_FORWARD:
            owner = layer.feed_forward
        if owner is None:
            names = self.block_names.get(self._kind_of(layer, kinds))
            return self.block.but(names=names), f"blocks.{number}", f"{called}.{rest}", None
        components, kind = kinds[owner]
        assert kind is not None
        return components[kind], path, rest, owner

    def _names(
        self, ours: str, owner: str | None, weight: Weight, layers: list[Layer], kinds: Kinds, model: Node
    ) -> list[str]:
        """The whole names of a tensor: that of its first copy, then all others."""
        name = weight.name
        if not ours.startswith("blocks.") or not weight.of_layer:
            return [name]
        number = int(ours.split(".")[1])
        layer = self._kind_of(layers[number], kinds)
        before, after = self.moved.get(layer, ("", ""))
        name = after + name.removeprefix(before) if name.startswith(before) else name
        use = sum(self._kind_of(other, kinds) == layer for other in layers[:number])
        shared = owner is not None and owner in (model.arguments["shared"] or {})
        holders = [n for n, other in enumerate(layers) if owner in other.mixers] if shared else [number]
        return [self.prefix.format(layer=holder) + name.replace("{use}", str(use)) for holder in holders]

    def _ahead(self, depth: int) -> tuple[str, ...]:
        """Regular expressions of the names of layers after the last."""
        return tuple("^" + self.prefix.format(layer=layer).replace(".", r"\.") for layer in range(depth, depth + 8))

    def _kind_of(self, layer: Layer, kinds: Kinds) -> str:
        """The component of a layer's mixer; of mixers side by side `a+b`, in the order in which `mixers` has them, of
        those in sequence `a|b`.
        """
        own = [kinds[name][1] or "" for name in layer.mixers]
        if self.in_sequence:
            return "|".join(own)
        return "+".join(sorted(own, key=list(self.mixers).index))

    def _layers(self, model: Node) -> tuple[list[Layer], list[str]]:
        """The parts of each layer, and what the family has not: mixers side by side if nothing joins them, or more than
        two parts in sequence if it is not `in_sequence`.
        """
        arguments = model.arguments
        items = expand_pattern(arguments["pattern"], arguments["depth"], list(arguments["mixers"]))
        last = None if arguments["feed_forward"] is None else FEED_FORWARD
        layers, joined = [], set()
        for item in items:
            first, *others = stages(item)
            several = len(first) > 1 and self.side_by_side is None
            if self.in_sequence:
                layers.append(Layer(tuple(each[0] for each in (first, *others)), last))
            else:
                several = several or len(others) + (last is not None) > 1
                layers.append(Layer(tuple(first), others[0][0] if others else last))
            if several or any(len(each) > 1 for each in others):
                joined.add(item)
        return layers, sorted(joined)

    def _kinds(self, model: Node, layers: list[Layer]) -> Kinds:
        parts = _parts(model)
        kinds: dict[str, tuple[Mapping[str, Component], str | None]] = {}
        for layer in layers:
            named = [(name, self.mixers) for name in layer.mixers]
            if layer.feed_forward is not None:
                named.append((layer.feed_forward, self.feed_forwards))
            for name, components in named:
                if name not in kinds:
                    kinds[name] = components, _kind(parts[name], components)
        return kinds


def _kind(node: Node, components: Mapping[str, Component]) -> str | None:
    """The name of the component that expresses this part, or lacks least; None if there are no components."""

    def distance(name: str) -> tuple[bool, int]:
        writer = ConfigWriter()
        components[name].write(writer, "", node)
        return components[name].target is not node.target, len(writer.problems)

    return min(components, key=distance) if components else None


def _parts(model: Node) -> dict[str, Node]:
    """The mixers and the feed-forward layer, with the arguments that they have from the model."""
    parts = {name: _part(model, settings) for name, settings in model.arguments["mixers"].items()}
    if model.arguments["feed_forward"] is not None:
        parts[FEED_FORWARD] = _part(model, model.arguments["feed_forward"])
    return parts


def _part(model: Node, settings: Settings) -> Node:
    """A part of the model, with the arguments that it has from the model."""
    inherited = {name: model.arguments[name] for name in ("width", "depth", "norm_eps")}
    return Node.of(settings, **inherited)
