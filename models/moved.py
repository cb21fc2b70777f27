"""Classes that older checkpoints and YAML files name by a path where they no longer are."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

from . import feed_forward, mixers

# Modules of classes that were named by `_target_` and have moved.
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
    """The settings of a model with each `_target_` that has moved replaced by where its class is now."""
    if isinstance(settings, list):
        return [with_current_paths(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: _current(value) if name == "_target_" else with_current_paths(value) for name, value in settings.items()
    }


def _current(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    return _paths().get(name, target) if module in MODULES else target


@cache
def _paths() -> dict[str, str]:
    """The dotted path of every class of a mixer or feed-forward layer."""
    paths: dict[str, str] = {}
    for package in (mixers, feed_forward):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            members = vars(import_module(found.name)).values()
            own = [each for each in members if isinstance(each, type) and each.__module__ == found.name]
            paths |= {each.__name__: f"{found.name}.{each.__name__}" for each in own}
    return paths
