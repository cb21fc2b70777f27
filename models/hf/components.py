"""Components: the parts of a model as a family's table declares them, and the parts that most families share.

A component is a class of ours, the fields of its settings and the names of its tensors. What most families of
transformers agree on is the default here, so that a family states what differs: `ATTENTION.but(bias=Fixed(True))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from ..block import Block
from ..feed_forward.swiglu import SwiGLU
from ..language_model import LanguageModel
from ..mixers.softmax.softmax_attention import SoftmaxAttention
from .config import ConfigReader, ConfigWriter
from .fields import Field, Fixed, Flag, Integer, Number, Quotient, Unread
from .rope import RopeBase, RopeScale

Settings = dict[str, Any]

_HYDRA = ("_target_", "_partial_", "_convert_")


@dataclass(frozen=True)
class Node:
    """A `_target_` of the settings: what it names, and its arguments by name, defaults included."""

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any], **inherited: Any) -> Node:
        """inherited: arguments that the model gives to those of its parts that declare them."""
        target = _named(settings["_target_"])
        parameters = signature(target).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not Parameter.empty}
        defaults |= {name: value for name, value in inherited.items() if name in parameters}
        given = {key: value for key, value in settings.items() if key not in _HYDRA}
        return cls(target, {**defaults, **given}, defaults)


def path_of(target: Callable[..., Any]) -> str:
    """The `_target_` that names a class."""
    return f"{target.__module__}.{target.__qualname__}"


def built(settings: Any) -> Any:
    """What nested settings describe, as Hydra instantiates it."""
    if not isinstance(settings, Mapping):
        return settings
    arguments = {key: built(value) for key, value in settings.items() if key not in _HYDRA}
    if "_target_" not in settings:
        return arguments
    target = _named(settings["_target_"])
    return partial(target, **arguments) if settings.get("_partial_") else target(**arguments)


def _named(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def _as_given(arguments: Mapping[str, Any], width: int) -> Mapping[str, Any]:
    return arguments


@dataclass(frozen=True)
class Component:
    """A part of a family's models.

    target: its class. fields: those of its settings by name; a setting without one keeps its default.
    names: their name of each of its tensors, by ours, or of a module with several: `{"query": "self_attn.q_proj"}`.
    meant: the arguments, given the model's width, with what defaults such as None stand for, and without those that
        have no effect.
    """

    target: Callable[..., Any]
    fields: Mapping[str, Field]
    names: Mapping[str, str]
    meant: Callable[[Mapping[str, Any], int], Mapping[str, Any]] = _as_given

    def but(self, *, names: Mapping[str, str] | None = None, **fields: Field) -> Component:
        """This component with other fields and names for some of its settings and tensors."""
        return replace(self, fields={**self.fields, **fields}, names={**self.names, **(names or {})})

    def read(self, reader: ConfigReader) -> Settings:
        read = {name: field.read(reader) for name, field in self.fields.items() if not isinstance(field, Unread)}
        return {"_target_": path_of(self.target), "_partial_": True, **read}

    def write(self, writer: ConfigWriter, setting: str, node: Node, width: int) -> None:
        """Puts the node's arguments into the config, and names those for which the family has no word."""
        if node.target is not self.target:
            writer.refuse(f"{setting}._target_", path_of(node.target))
            return
        arguments = self.meant(node.arguments, width)
        for name, field in self.fields.items():
            if name in arguments:
                field.write(writer, f"{setting}.{name}", arguments[name])
        for name in arguments.keys() - self.fields.keys():
            if name not in node.defaults or arguments[name] != node.defaults[name]:
                writer.refuse(f"{setting}.{name}", arguments[name])

    def their_name(self, name: str) -> str:
        """Their name, within a layer or a model, of the parameter `name` of this part."""
        if name in self.names:
            return self.names[name]
        module, _, parameter = name.rpartition(".")
        return f"{self.names[module]}.{parameter}"


def _attention_meant(arguments: Mapping[str, Any], width: int) -> Mapping[str, Any]:
    heads = arguments["heads"]
    meant = {
        **arguments,
        "kv_heads": arguments["kv_heads"] or heads,
        "head_dim": arguments["head_dim"] or width // heads,
    }
    if meant["qk_norm"] is None:
        del meant["norm_eps"]
    return meant


MODEL = Component(
    LanguageModel,
    {
        "vocabulary": Integer("vocab_size"),
        "width": Integer("hidden_size"),
        "depth": Integer("num_hidden_layers"),
        "norm_eps": Number("rms_norm_eps", 1e-6),
        "tied_embeddings": Flag("tie_word_embeddings"),
        "initial_std": Unread("initializer_range"),
        **dict.fromkeys(("activation_checkpointing", "pattern", "mixers", "feed_forward", "block"), Unread()),
    },
    {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
)
BLOCK = Component(
    Block,
    {"norm_eps": Unread("rms_norm_eps")},
    {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
)
ATTENTION = Component(
    SoftmaxAttention,
    {
        "heads": Integer("num_attention_heads"),
        "kv_heads": Integer("num_key_value_heads", "num_attention_heads", divides="num_attention_heads"),
        "head_dim": Integer("head_dim", Quotient("hidden_size", "num_attention_heads")),
        "rope_base": RopeBase(),
        "rope_scaling": RopeScale(),
        "qk_norm": Fixed(None),
        "window": Fixed(None),
        "bias": Fixed(False),
        "output_bias": Fixed(False),
    },
    {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
    },
    _attention_meant,
)
GATED_MLP = Component(
    SwiGLU,
    {"hidden": Integer("intermediate_size"), "bias": Fixed(False)},
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
)
