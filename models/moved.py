"""Classes that have moved and parameters that were renamed: how older checkpoints and YAML files name them."""

from __future__ import annotations

import pkgutil
import re
from functools import cache
from importlib import import_module
from typing import Any

from . import feed_forward, mixers

# Where classes that a `_target_` can name used to be.
MODULES = frozenset(
    {
        feed_forward.__name__,
        *(
            f"{mixers.__name__}.{module}"
            for module in (
                "block_sparse_attention", "gated_deltanet", "gated_linear_attention", "kimi_delta_attention",
                "lightning_attention", "mamba", "mamba2", "mlstm", "native_sparse_attention", "retnet", "rwkv7",
                "softmax_attention",
            )
        ),
    }
)  # fmt: skip


def with_current_paths(settings: Any) -> Any:
    """A model's settings with the old path of a moved class replaced by its current one, in every `_target_`."""
    if isinstance(settings, list):
        return [with_current_paths(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: _current(value) if name == "_target_" else with_current_paths(value) for name, value in settings.items()
    }


def former_name(parameter: str) -> str:
    """What older checkpoints call a parameter: the layers of maps of low rank had numbers for names."""
    return re.sub(r"\.(down|up)(\.\w+)$", lambda match: f".{int(match[1] == 'up')}{match[2]}", parameter)


def _current(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return _paths().get(name, target) if module in MODULES else target


@cache
def _paths() -> dict[str, str]:
    """The current dotted path of every class in the packages of mixers and feed-forward layers, by its name."""
    paths: dict[str, str] = {}
    for package in (mixers, feed_forward):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(import_module(module.name)).values()
            own = [each for each in members if isinstance(each, type) and each.__module__ == module.name]
            paths |= {each.__name__: f"{module.name}.{each.__name__}" for each in own}
    return paths
