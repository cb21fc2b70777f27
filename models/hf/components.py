"""Components: the parts of a model as the table of a family declares them.

A component is one of our classes with a field per setting and the names of its tensors. `MODEL`, `BLOCK`, `ATTENTION`
and `GATED_MLP` hold what most families of transformers share. A family states how it differs from them:
`ATTENTION.but(bias=Fixed(True))`.
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
    """A `_target_` of the settings: what it names, and its arguments, defaults included."""

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any], **inherited: Any) -> Node:
        """inherited: arguments that a model passes to those of its parts that declare them."""
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
    """What nested settings describe, made as Hydra makes it."""
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


def _unchanged(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return arguments


@dataclass(frozen=True)
class Component:
    """A part of the models of a family.

    target: our class. fields: one per setting that the family expresses; any other setting must keep its default.
    names: transformers' names by ours, of parameters or of modules with parameters: `{"query": "self_attn.q_proj"}`.
    resolve: turns the arguments of `target` into those that count: None becomes what it stands for, and settings
        without effect are left out.
    """

    target: Callable[..., Any]
    fields: Mapping[str, Field]
    names: Mapping[str, str]
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _unchanged

    def but(self, *, names: Mapping[str, str] | None = None, **fields: Field) -> Component:
        """This component with some fields and names replaced or added."""
        return replace(self, fields={**self.fields, **fields}, names={**self.names, **(names or {})})

    def read(self, reader: ConfigReader) -> Settings:
        """The settings of this part, as a partial."""
        read = {name: field.read(reader) for name, field in self.fields.items() if not isinstance(field, Unread)}
        return {"_target_": path_of(self.target), "_partial_": True, **read}

    def write(self, writer: ConfigWriter, setting: str, node: Node) -> None:
        """Writes the arguments of `node`, whose path in the settings is `setting`, and notes those not expressed."""
        if node.target is not self.target:
            writer.refuse(f"{setting}._target_", path_of(node.target))
            return
        arguments = self.resolve(node.arguments)
        for name, field in self.fields.items():
            if name in arguments:
                field.write(writer, f"{setting}.{name}", arguments[name])
        for name, value in arguments.items():
            if name not in self.fields and (name not in node.defaults or value != node.defaults[name]):
                writer.refuse(f"{setting}.{name}", value)

    def their_name(self, name: str) -> str:
        """transformers' name of the parameter `name` of this part, without the prefix of its layer."""
        if name in self.names:
            return self.names[name]
        module, _, parameter = name.rpartition(".")
        return f"{self.names[module]}.{parameter}"


def _resolve_attention(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = arguments["heads"]
    resolved = {
        **arguments,
        "kv_heads": arguments["kv_heads"] or heads,
        "head_dim": arguments["head_dim"] or arguments["width"] // heads,
    }
    if resolved["qk_norm"] is None:
        del resolved["norm_eps"]
    return resolved


MODEL = Component(
    LanguageModel,
    {
        "vocabulary": Integer("vocab_size"),
        "width": Integer("hidden_size"),
        "depth": Integer("num_hidden_layers"),
        "norm_eps": Number("rms_norm_eps", 1e-6),
        "tied_embeddings": Flag("tie_word_embeddings"),
        "initial_std": Unread("initializer_range"),
        "embedding_std": Unread(),
        **dict.fromkeys(("activation_checkpointing", "pattern", "mixers", "feed_forward", "block"), Unread()),
        **dict.fromkeys(("multi_token_prediction", "multi_token_prediction_weight"), Unread()),
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
    _resolve_attention,
)
GATED_MLP = Component(
    SwiGLU,
    {"hidden": Integer("intermediate_size"), "bias": Fixed(False)},
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
)
