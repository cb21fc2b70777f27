"""Mixer: the base class of whatever mixes tokens, and how parts of a model are built from their settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.sequence import Sequence


class Mixer(nn.Module):
    """Projections and gates around an op of `parallel.ops`.

    Subclasses take plain keyword arguments: `width` always, and if they declare them `layer` (index in the whole model,
    from 0), `depth` and `occurrence` (how many earlier layers have the same name in the pattern). They import token
    mixing from `parallel.ops` alone, so that they never see a rank, and end in a linear layer called `output`, whose
    initial values are scaled down with the model's depth.

    publishes, reads: names of tensors that the mixer gives to later layers, and of those it takes from earlier ones.
        `forward` takes what it reads after `seq`, and returns what it publishes after its output, as a tuple.
    no_weight_decay: names of own parameters (`"layer.weight"` for those of a layer) that weight decay leaves alone
        though they are matrices, such as the logarithms of decay rates. Those of one dim never decay anyway.
    small: settings with which a few dozen tokens exercise all of the mixer; the doctor takes them for larger ones.
    """

    publishes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    no_weight_decay: tuple[str, ...] = ()
    small: Mapping[str, int] = MappingProxyType({})

    def forward(self, x: Tensor, seq: Sequence, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`[B, T, D]` of the tokens held here to the same shape."""
        raise NotImplementedError

    def mixing_flops(self, seq: Sequence) -> int:
        """Forward FLOPs of the ops on the tokens that `seq`'s rank holds; linear layers are counted by the model."""
        raise NotImplementedError

    def at_step(self, step: int) -> None:
        """Told before each step of training, counted from 0: for what changes as a run goes on."""

    def initialise_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> bool:
        """Fill `tensor` for the parameter `name` and return True; or return False for the model's own rule."""
        return False


def construct(part: Callable[..., nn.Module], setting: str, **available: Any) -> nn.Module:
    """Calls a partial from the configuration with those of the `available` arguments that its signature declares.

    Raises ValueError, naming `setting` and near matches, for arguments that the part does not know, and for missing
    ones: a partial hides both until it is called.
    """
    function = part.func if isinstance(part, partial) else part
    given = dict(part.keywords) if isinstance(part, partial) else {}
    parameters = inspect.signature(function).parameters
    for name in given:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(parameters)}"
            raise ValueError(f"{setting} must use settings of {function.__name__}; got {name!r}. {hint}")
    arguments = {name: value for name, value in available.items() if name in parameters and name not in given}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in given and name not in arguments
    ]
    if missing:
        raise ValueError(f"{setting} must give {', '.join(missing)}; got {', '.join(given) or 'nothing'}")
    return part(**arguments)


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless groups of query heads can share the key/value heads."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}; got {kv_heads}")


def head_size(setting: str, width: int, heads: int) -> int:
    """The width of one head, or a ValueError that names the setting."""
    if heads < 1 or width % heads:
        raise ValueError(f"{setting} must divide width={width}; got {heads}. Change it, or give the head's size itself")
    return width // heads
