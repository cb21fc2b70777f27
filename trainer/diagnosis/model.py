"""The user's model made small: the same kinds of layers, heads, groups and taps at a fraction of the width."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_object
from torch import nn

from ...models.language_model import LanguageModel

Build = Callable[[dict[str, Any]], LanguageModel]
VOCABULARY = 61
WIDTHS = range(24, 1 << 20, 8)  # tried in this order
SIZES = re.compile(r"(^|_)(hidden|dim|state|rank)$")  # settings that count channels, not heads
COUNTS = re.compile(r"heads|groups")  # attributes that a smaller model must share with the whole one: ranks divide them


def reduced(model: dict[str, Any], build: Build, *, window: int) -> dict[str, Any]:
    """A configuration of little width with one layer of each kind of mixer, two of those that give others tensors.

    Settings that count channels shrink with the width; heads, groups and taps stay. Windows shrink to `window`, other
    settings to what the mixer says is small. The smallest width that every layer accepts is taken. Raises ValueError if
    the model itself cannot be built.
    """
    whole = complete(model)
    with torch.device("meta"):
        original = build(whole)
    names = original.names
    talkative = {name for name, mixer in zip(names, original.mixers, strict=True) if mixer.reads or mixer.publishes}
    if len(set(names)) == 1:
        talkative.add(names[0])  # a layer behind another one, in any model
    pattern: list[str] = []
    for name in names:
        if pattern.count(name) < (2 if name in talkative else 1):
            pattern.append(name)
    counts = {name: _counts(mixer) for name, mixer in zip(names, original.mixers, strict=True)}
    for width in (w for w in WIDTHS if w < original.width):
        small = {**_scaled(whole, width / original.width, window), "width": width, "depth": len(pattern)}
        small["pattern"] = pattern
        small["vocabulary"] = VOCABULARY
        try:
            with torch.device("meta"):
                made = build(small)
        except (ValueError, ZeroDivisionError):
            continue
        if all(_counts(mixer) == counts[name] for name, mixer in zip(pattern, made.mixers, strict=True)):
            return small
    return {**_scaled(whole, 1.0, window), "depth": len(pattern), "pattern": pattern, "vocabulary": VOCABULARY}


def complete(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a vocabulary, and without recomputation, which is checked by itself."""
    if not model.get("_target_"):
        raise ValueError("model must be a configuration with a _target_; got none. Choose one: model=llama_tiny")
    whole = copy.deepcopy(model)
    whole["vocabulary"] = whole.get("vocabulary") or VOCABULARY
    whole.pop("activation_checkpointing", None)
    return whole


def _scaled(settings: Any, ratio: float, window: int) -> Any:
    if isinstance(settings, dict):
        result = {}
        for name, value in {**settings, **_small(settings)}.items():
            if type(value) is int and name == "window":
                result[name] = min(value, window)
            elif type(value) is int and SIZES.search(name):
                result[name] = max(1, round(value * ratio))
            elif name in ("rope_scaling", "width"):
                result[name] = value
            else:
                result[name] = _scaled(value, ratio, window)
        return result
    return settings


def _small(settings: dict[str, Any]) -> dict[str, int]:
    """What a mixer says that it gets in place of larger settings, given or default."""
    if "_target_" not in settings:
        return {}
    part = get_object(settings["_target_"])
    known, least = inspect.signature(part).parameters, getattr(part, "small", {})
    return {name: min(value, settings.get(name, known[name].default)) for name, value in least.items()}


def _counts(mixer: nn.Module) -> dict[str, int]:
    """How many heads and groups a mixer has, by attribute."""
    return {name: value for name, value in vars(mixer).items() if type(value) is int and COUNTS.search(name)}


@torch.no_grad()
def fill(model: LanguageModel, seed: int = 0) -> None:
    """Gives each parameter a value that depends on its name and leaves no path of the model without effect.

    A new model's gates are nearly open or shut and some of its matrices zero: an error behind one would not show.
    """
    model.initialise(seed)
    for name, parameter in model.named_parameters():
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
        noise = torch.randn(parameter.shape, generator=generator)
        value = parameter.float().cpu().clamp(-2.0, 2.0)
        scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        parameter.copy_(value + scale * noise)


def layer_names(model: LanguageModel) -> list[str]:
    """What messages call each layer."""
    return [
        f"layer {layer} ({name}, {type(mixer).__name__})"
        for layer, (name, mixer) in enumerate(zip(model.names, model.mixers, strict=True))
    ]
