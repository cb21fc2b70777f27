"""Initial values of a model's parameters, which depend on a seed and the parameter's name alone."""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from .mixer import RECIPE, name_of
from .part import Composite, Part

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # of torch, whose weights start at 1 as ours do


class Model(Protocol):
    """What is asked of a language model."""

    depth: int

    @property
    def composites(self) -> list[tuple[str, Composite]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def naming(self, number: int) -> AbstractContextManager[None]: ...


def check_stds(initial_std: float, embedding_std: float | None, tied_embeddings: bool) -> None:
    """Raises ValueError for standard deviations that weights cannot begin with."""
    for name, value in (("initial_std", initial_std), ("embedding_std", embedding_std or 0)):
        if value < 0:
            raise ValueError(f"model.{name} must not be negative; got {value}")
    if embedding_std is not None and tied_embeddings:
        raise ValueError(
            f"model.embedding_std must be null with tied_embeddings; got {embedding_std}. Set model.initial_std, by "
            "which the head's weight starts"
        )


def initial_value(
    model: Model, name: str, shape: torch.Size, seed: int, std: float, embedding_std: float | None
) -> Tensor:
    """The value of the parameter `name`, float32 on the CPU; see `LanguageModel.initialise`.

    Raises ValueError for one that is no matrix and for which no layer has a value.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    path = name.split(".")
    for cut in range(1, len(path)):  # from the outermost module inwards: a mixer knows more than its layers
        module = model.get_submodule(".".join(path[:cut]))
        own = getattr(module, "initialise_parameter", None)
        if own is None:
            if isinstance(module, NORMS) and path[cut:] == ["weight"]:
                return value.fill_(1.0)
            continue
        with _naming(model, name):
            done = own(".".join(path[cut:]), value, generator)
        if not isinstance(done, bool):
            raise ValueError(
                f"{name} must be answered for with True or False; got {done!r} from initialise_parameter of "
                f"{name_of(type(module))}. Return True where it has filled the tensor, and False elsewhere"
            )
        if done:
            return value
    if path[-1] == "bias":
        return value.zero_()
    owners = [(cut, model.get_submodule(".".join(path[:cut]))) for cut in range(1, len(path))]
    parts = [(cut, owner) for cut, owner in owners if isinstance(owner, Part)]
    if value.dim() < 2:
        settings = [part.setting for _, part in parts if part.setting]
        raise ValueError(
            f"{name}{f' of {settings[-1]}' if settings else ''} must get its initial value from "
            "initialise_parameter of its mixer or layer; it is not a matrix, and has no other. Fill the tensor "
            f"there and return True, as {RECIPE} shows"
        )
    writes_residual = any(".".join(path[cut:-1]) in part.outputs for cut, part in parts)
    scale = 1 / math.sqrt(2 * model.depth) if writes_residual else 1.0
    chosen = std if embedding_std is None or path[0] != "embedding" else embedding_std
    return value.normal_(0.0, chosen * scale, generator=generator)


def _naming(model: Model, parameter: str) -> AbstractContextManager[None]:
    for number, (path, _) in enumerate(model.composites):
        if parameter.startswith(f"{path}."):
            return model.naming(number)
    return nullcontext()
