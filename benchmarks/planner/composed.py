"""Settings as the planner's command composes them from overrides, for the scripts beside this one."""

from __future__ import annotations

from typing import Any

import hydra

from longreach.launch import configuration
from longreach.launch.build import build
from longreach.launch.plan import Configuration
from longreach.launch.train import to_settings
from longreach.trainer.planning.cluster import ClusterSettings
from longreach.trainer.planning.estimate import Estimate, Estimator
from longreach.trainer.settings import Settings


def composed(*overrides: str) -> tuple[Settings, ClusterSettings]:
    """What `python -m longreach.launch.plan OVERRIDES` works with."""
    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        config = hydra.compose("plan", list(overrides))
    settings = to_settings(config, list(overrides), {})
    return settings, configuration.to_schema(config, Configuration).cluster


def estimator(settings: Settings) -> Estimator:
    """Of the model of these settings."""
    model: dict[str, Any] = dict(settings.model)
    model["vocabulary"] = model.get("vocabulary") or 131072
    return Estimator(build, model)


def estimate(*overrides: str) -> Estimate:
    """The planner's estimate."""
    settings, cluster = composed(*overrides)
    cluster.check()
    return estimator(settings).estimate(settings, cluster)
