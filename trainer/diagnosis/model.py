"""The user's model made small: two layers of each kind, the same heads, groups and taps, a fraction of the width."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from hydra.utils import get_object
from torch import nn

from ...models.activations.recomputation import SETTINGS as MEMORY
from ...models.language_model import LanguageModel
from ...models.mixer import Mixer, small_sizes
from ...models.part import Part, named_weights

Build = Callable[[dict[str, Any]], LanguageModel]
VOCABULARY = 61
WIDTHS = range(24, 1 << 20, 8)  # tried in this order
COUNTS = ("heads", "groups")  # settings with these words in their names stay as they are: ranks divide them


def reduced(model: dict[str, Any], build: Build, *, window: int) -> dict[str, Any]:
    """A configuration of little width with two layers of each kind of mixer, where the model has as many.

    Windows, and blocks of positions, shrink to `window`, other sizes to the mixer's or feed-forward layer's `small`;
    heads, groups and taps stay.
    Values of one setting that differ between layers still differ: if they were equal, a cache that confuses layers
    would not show. The width is the smallest that every layer accepts; if none is, widths of heads and model stay.
    Raises ValueError if the model itself cannot be built.
    """
    whole = complete(model)
    with torch.device("meta"):
        original = build(whole)
    names = original.names
    pattern: list[str] = []
    for name in names:
        if pattern.count(name) < 2:
            pattern.append(name)
    counts = {name: _counts(mixer) for name, mixer in zip(names, original.mixers, strict=True)}
    layers = {"depth": len(pattern), "pattern": pattern, "vocabulary": VOCABULARY}
    for width in (*(w for w in WIDTHS if w < original.width), original.width):
        for distinct in (True, False):  # settings that differ may not fit together when they are small
            small = {**_Small(window, _values(whole) if distinct else {})(whole), "width": width, **layers}
            try:
                with torch.device("meta"):
                    made = build(small)
            except Exception:  # a mixer may refuse sizes in any way; those of the whole model it has accepted
                continue
            if all(_counts(mixer) == counts[name] for name, mixer in zip(pattern, made.mixers, strict=True)):
                return small
    return {**_Small(window, {}, kept=Mixer.small)(whole), **layers}


def complete(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a vocabulary, and without what saves memory; recomputation is checked by itself."""
    whole = copy.deepcopy(model)
    whole["vocabulary"] = whole.get("vocabulary") or VOCABULARY
    return {name: value for name, value in whole.items() if name not in MEMORY}


def shrunk(whole: dict[str, Any], small: dict[str, Any]) -> list[str]:
    """What `reduced` made small, as "setting from -> to"; settings that are left at a default have no "from"."""
    before, after = _leaves(whole), _leaves(small)
    names = [name for name in after if name.split(".")[0] != "pattern" and before.get(name) != after[name]]
    return [f"{name} {before[name]} -> {after[name]}" if name in before else f"{name} {after[name]}" for name in names]


def _leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}".removeprefix("mixers.")
        leaves |= _leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves


class _Small:
    """Settings made small.

    values: for each name its different values, ascending, which are to stay different. kept: sizes not to change.
    """

    def __init__(self, window: int, values: dict[str, list[int]], kept: Collection[str] = ()) -> None:
        self.window, self.values, self.kept = window, values, kept

    def __call__(self, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        least = {name: size for name, size in _least(settings).items() if name not in self.kept}
        result, whole = {}, {**settings, **_numbers(settings, least)}
        for name, value in whole.items():
            if type(value) is int and (name == "window" or (name == "block" and name not in least)):
                result[name] = min(value, max(2, self.window - 3 * self._above(name, value)))
            elif type(value) is int and name in least:
                # By doubling, what divides another value goes on doing so.
                result[name] = min(value, least[name] << self._below(name, value))
            else:
                result[name] = self(value)
        return {name: value for name, value in result.items() if name in settings or value != whole[name]}

    def _below(self, name: str, value: int) -> int:
        return sum(other < value for other in self.values.get(name, ()))

    def _above(self, name: str, value: int) -> int:
        return sum(other > value for other in self.values.get(name, ()))


def _values(settings: Any) -> dict[str, list[int]]:
    """The different values of each setting that shrinks, wherever in the model."""
    values_of: dict[str, set[int]] = {}
    if isinstance(settings, dict):
        for name, value in {**settings, **_numbers(settings, _least(settings))}.items():
            if type(value) is int:
                values_of.setdefault(name, set()).add(value)
            for inner, values in _values(value).items():
                values_of.setdefault(inner, set()).update(values)
    return {name: sorted(values) for name, values in values_of.items()}


def _least(settings: dict[str, Any]) -> dict[str, int]:
    """The sizes that replace larger ones of a part, without counts of heads and groups."""
    sizes = small_sizes(get_object(settings["_target_"])) if "_target_" in settings else {}
    return {name: size for name, size in sizes.items() if not _is_count(name)}


def _is_count(name: str) -> bool:
    return any(word in name for word in COUNTS)


def _numbers(settings: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    """Those settings of a part, given or default, that are numbers."""
    known = inspect.signature(get_object(settings["_target_"])).parameters if names else {}
    values = {name: settings.get(name, known[name].default) for name in names}
    return {name: value for name, value in values.items() if type(value) is int}


def _counts(mixer: nn.Module) -> dict[str, int]:
    """How many heads and groups a mixer has, by attribute."""
    return {name: value for name, value in vars(mixer).items() if type(value) is int and _is_count(name)}


@torch.no_grad()
def fill(model: LanguageModel, seed: int = 0) -> None:
    """Gives each parameter a value that depends on its name and leaves no path of the model without effect.

    A new model's gates are nearly open or shut and some of its matrices zero: an error behind one would not show.
    """
    LanguageModel.initialise(model, seed)  # whatever stands in for it here
    for name, parameter in named_weights(model):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
        noise = torch.randn(parameter.shape, generator=generator)
        value = parameter.float().cpu().clamp(-2.0, 2.0)
        scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        parameter.copy_(value + scale * noise)


def layer_names(model: LanguageModel) -> list[str]:
    """What messages call each layer, and each module of multi-token prediction after them."""
    names = [*model.names, *[model.names[-1]] * len(model.multi_token_prediction)]
    where = [
        f"layer {n}" if n < model.depth else f"multi-token prediction {n - model.depth + 1}" for n in range(len(names))
    ]
    return [
        f"{place} ({name}, {type(mixer).__name__})"
        for place, name, mixer in zip(where, names, first_parts(model), strict=True)
    ]


def first_parts(model: LanguageModel) -> list[Part]:
    """The mixer of each block, or its mixers side by side; those of multi-token prediction come last."""
    return [block.part(block.names[0]) for _, block in model.composites]
