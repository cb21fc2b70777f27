"""python -m longreach.launch.plan OVERRIDES — what a run would take on a cluster, and which layouts would fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import hydra
import torch
from omegaconf import DictConfig

from ..trainer.planning.cluster import ClusterSettings
from ..trainer.planning.estimate import Estimator
from ..trainer.planning.ranking import ranked
from ..trainer.planning.report import lines
from ..trainer.preparation import configured_model
from ..trainer.requirements import at_least
from ..trainer.run import failure
from ..trainer.settings import Settings
from ..trainer.stages.opening import check_stages
from ..trainer.stages.plan import plan_of
from . import configuration
from .build import build
from .memory import VOCABULARY
from .train import to_settings


@dataclass
class Configuration(Settings):
    """The settings of training, the cluster, and what to show."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    budget: float = 1e12  # tokens whose days are told
    top: int = 10  # layouts of the ranking that are shown; 0: none is tried


configuration.register("plan_settings", Configuration)


def told(settings: Settings, cluster: ClusterSettings, budget: float, top: int) -> Iterator[str]:
    """Estimate and ranking, of each stage, as they come. Raises ValueError for settings that training refuses."""
    at_least("top", top, 0)
    at_least("budget", budget, 1)
    cluster.check()
    plan = plan_of(settings)
    check_stages(build, plan, cluster.gpus, torch.device("cuda"))
    for stage in plan.stages:
        if stage.number:
            yield ""
        if plan.staged:
            yield f"stage {stage.name}, steps {stage.first + 1} to {stage.stop}"
        with stage.checked():
            yield from _told(stage.settings, cluster, budget, top)


def _told(settings: Settings, cluster: ClusterSettings, budget: float, top: int) -> Iterator[str]:
    model = configured_model(settings)
    for name in ("activation_checkpointing", "tile_tokens", "offload_activations"):  # they are of the settings
        model.pop(name, None)
    model["vocabulary"] = model.get("vocabulary") or settings.data.vocabulary_size or VOCABULARY
    estimator = Estimator(build, model)
    estimator.refuse(settings)
    yield from lines(estimator.estimate(settings, cluster), budget)
    if top:
        yield ""
        yield from ranked(estimator, settings, cluster, top)


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="plan")
    def compose(config: DictConfig) -> None:
        try:
            settings = to_settings(config, configuration.overrides(), configuration.choices())
            given = configuration.to_schema(config, Configuration)
            for line in told(settings, given.cluster, given.budget, given.top):
                print(line, flush=True)
        except Exception as error:
            print(failure.message(error, started=False), file=sys.stderr)
            sys.exit(1)

    configuration.run_main(compose, "plan", configuration.texts_of(Configuration))


if __name__ == "__main__":
    main()
