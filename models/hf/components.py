"""Components: the parts of a model as the table of a family declares them.

A component is one of our classes with a field per setting and the places of its tensors. `MODEL`, `BLOCK`,
`ATTENTION`, `GATED_MLP` and `MIXTURE` hold what most families of transformers share. A family states how it differs
from them: `ATTENTION.but(bias=Fixed(True))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from functools import cache, partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from ..activations.recomputation import SETTINGS as MEMORY
from ..block import Block, OutputNormBlock
from ..feed_forward.experts import MixtureOfExperts
from ..feed_forward.swiglu import SwiGLU
from ..language_model import LanguageModel
from ..mixers.softmax.softmax_attention import SoftmaxAttention
from .config import ConfigReader, ConfigWriter
from .fields import Coefficient, Field, Fixed, Flag, Integer, Number, Quotient, Unread
from .rope import RopeBase, RopeScale, folded
from .tensors import Weight, halves, per_head, rows_of

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
        parameters = _parameters(target)
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


@cache
def _parameters(target: Callable[..., Any]) -> Mapping[str, Parameter]:
    return signature(target).parameters


def _named(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def _unchanged(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return arguments


@dataclass(frozen=True)
class Component:
    """A part of the models of a family.

    target: our class. fields: one per setting that the family expresses; any other setting must keep its default.
    names: where transformers keeps our parameters, or modules with parameters, by our names of them:
        `{"query": "self_attn.q_proj"}`, or a `Weight` where they differ by more than the name.
    resolve: turns the arguments of `target` into those that count: None becomes what it stands for, and settings
        without effect are left out.
    fixed: our buffers that its checkpoints do not hold, and the value that they must have there (None for any).
    """

    target: Callable[..., Any]
    fields: Mapping[str, Field]
    names: Mapping[str, str | Weight]
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _unchanged
    fixed: Mapping[str, float | None] = attribute(default_factory=dict)

    def but(
        self,
        *,
        target: Callable[..., Any] | None = None,
        names: Mapping[str, str | Weight] | None = None,
        resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        **fields: Field,
    ) -> Component:
        """This component with another class or rule, and some fields and names replaced or added."""
        return replace(
            self,
            target=target or self.target,
            fields={**self.fields, **fields},
            names={**self.names, **(names or {})},
            resolve=resolve or self.resolve,
        )

    def moved(self, before: str, after: str) -> Component:
        """This component where transformers' names begin with `after` instead of `before`."""

        def place(where: str | Weight) -> str | Weight:
            if isinstance(where, Weight):
                return replace(where, name=str(place(where.name)))
            return after + where.removeprefix(before) if where.startswith(before) else where

        return replace(self, names={name: place(where) for name, where in self.names.items()})

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

    def place(self, name: str) -> Weight | None:
        """Where the parameter or buffer `name` of this part is kept, without its layer's prefix; None if nowhere."""
        module, _, parameter = name.rpartition(".")
        found = self.names.get(name)
        if found is None and (found := self.names.get(module)) is not None:
            whole = found if isinstance(found, Weight) else Weight(found)
            return replace(whole, name=f"{whole.name}.{parameter}")
        return Weight(found) if isinstance(found, str) else found


def _resolve_attention(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = arguments["heads"]
    resolved = {
        **arguments,
        "kv_heads": arguments["kv_heads"] or heads,
        "head_dim": arguments["head_dim"] or arguments["width"] * (1 + arguments["with_embedding"]) // heads,
    }
    if resolved["qk_norm"] is None:
        del resolved["norm_eps"]
    if resolved["scale"] is not None and resolved["scale"] == resolved["head_dim"] ** -0.5:
        resolved["scale"] = None
    return folded(resolved, resolved["head_dim"] * resolved["rope_fraction"])


def _resolve_experts(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    grouped = arguments["groups"] != 1
    return {name: value for name, value in arguments.items() if name != "group_scores" or grouped}


def scale_written(component: Component) -> Component:
    """A component of attention whose scale is written in any case."""

    def resolve(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        resolved = component.resolve(arguments)
        return {**resolved, "scale": resolved["scale"] or resolved["head_dim"] ** -0.5}

    return component.but(resolve=resolve)


def _pairs(mixer: SoftmaxAttention) -> Tensor:
    """The rows of a head where pairs are neighbours: the first of each, the second of each, then what does not turn."""
    assert mixer.rotary is not None
    turned = mixer.rotary.rotation.dims
    return torch.cat([halves(turned), torch.arange(turned, mixer.head_dim)])


def _fused(number: int, sizes: Callable[[Any], Sequence[int]], name: str) -> Weight:
    """One of the parts that stand one after the other in a fused projection."""
    return Weight(name, rows=lambda layer: rows_of(number, sizes(layer)))


def _qkv(mixer: SoftmaxAttention) -> Sequence[int]:
    return [heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]


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
        **dict.fromkeys((*MEMORY, "pattern", "mixers", "feed_forward", "block"), Unread()),
        **dict.fromkeys(("side_by_side", "multi_token_prediction", "multi_token_prediction_weight"), Unread()),
    },
    {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
)
BLOCK = Component(
    Block,
    {"norm_eps": Unread("rms_norm_eps")},
    {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
)
# That of OLMo 2: norms of what parts return.
OUTPUT_NORM_BLOCK = BLOCK.but(
    target=OutputNormBlock,
    names={"mixer_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"},
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
# Where rotary pairs are neighbours.
INTERLEAVED = {
    "query": Weight("self_attn.q_proj", rows=lambda mixer: per_head(mixer.heads, _pairs(mixer))),
    "key": Weight("self_attn.k_proj", rows=lambda mixer: per_head(mixer.kv_heads, _pairs(mixer))),
}
# That of Qwen3: a norm of each query and key head, biases by a key.
HEAD_NORMED_ATTENTION = ATTENTION.but(
    bias=Flag("attention_bias"),
    output_bias=Flag("attention_bias"),
    qk_norm=Fixed("head"),
    norm_eps=Unread("rms_norm_eps"),
    names={"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
)
GATED_MLP = Component(
    SwiGLU,
    {"hidden": Integer("intermediate_size"), "bias": Fixed(False)},
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
)
# Projections of queries, keys and values in one, as gates and values of the feed-forward layer.
FUSED = {name: _fused(number, _qkv, "self_attn.qkv_proj") for number, name in enumerate(("query", "key", "value"))}
FUSED_GATED_MLP = GATED_MLP.but(
    names={
        name: _fused(number, lambda layer: [layer.up.out_features] * 2, "mlp.gate_up_proj")
        for number, name in enumerate(("gate", "up"))
    }
)
MIXTURE = Component(
    MixtureOfExperts,
    {
        "hidden": Integer("intermediate_size"),
        "experts": Integer("num_experts"),
        "experts_per_token": Integer("num_experts_per_tok"),
        "shared_hidden": Fixed(0),
        "renormalise": Fixed(True),
        "balance": Coefficient("router_aux_loss_coef", 0.001),
        **dict.fromkeys(("z", "bias_rate"), Unread()),
    },
    {
        "router.weight": "mlp.gate.weight",
        "experts.gate.weight": "mlp.experts.{}.gate_proj.weight",
        "experts.up.weight": "mlp.experts.{}.up_proj.weight",
        "experts.down.weight": "mlp.experts.{}.down_proj.weight",
    },
    _resolve_experts,
    fixed={"router.bias": 0.0, "shares": None},
)
MIXTRAL_MIXTURE = MIXTURE.but(
    experts=Integer("num_local_experts", 8),
    experts_per_token=Integer("num_experts_per_tok", 2),
    names={
        "router.weight": "block_sparse_moe.gate.weight",
        "experts.gate.weight": "block_sparse_moe.experts.{}.w1.weight",
        "experts.up.weight": "block_sparse_moe.experts.{}.w3.weight",
        "experts.down.weight": "block_sparse_moe.experts.{}.w2.weight",
    },
)
