"""python -m longreach.launch.memory OVERRIDES — what a step with these overrides holds in memory, by part."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import hydra
import torch
from omegaconf import DictConfig

from ..trainer.memory.account import account
from ..trainer.preparation import configured_model
from ..trainer.requirements import at_least, one_of
from ..trainer.run import failure
from ..trainer.settings import Settings
from ..trainer.stages.opening import check_stages
from ..trainer.stages.plan import plan_of
from . import configuration
from .build import build
from .train import to_settings

DEVICES = ("cuda", "cpu")
VOCABULARY = 32768  # where the tokenizer would tell


@dataclass
class MemorySettings:
    """The settings of this command; all others are those of training."""

    ranks: int = 1  # of the run, all together
    device: str = "cuda"  # or cpu, where the ops' own temporaries are in the account


@dataclass
class Configuration(Settings):
    """The settings of training, and `memory`."""

    memory: MemorySettings = field(default_factory=MemorySettings)


configuration.register("memory_settings", Configuration)


def lines(settings: Settings, chosen: MemorySettings) -> list[str]:
    """The account of a rank, of each stage. Raises ValueError for settings that training refuses."""
    at_least("memory.ranks", chosen.ranks, 1)
    one_of("memory.device", chosen.device, DEVICES)
    made, plan = [], plan_of(settings)
    check_stages(build, plan, chosen.ranks, torch.device(chosen.device))
    for stage in plan.stages:
        with stage.checked():
            made += [f"stage {stage.name}"] * plan.staged + _lines(stage.settings, chosen)
    return made


def _lines(settings: Settings, chosen: MemorySettings) -> list[str]:
    device = torch.device(chosen.device)
    model = configured_model(settings)
    model["vocabulary"] = model.get("vocabulary") or settings.data.vocabulary_size or VOCABULARY
    made = account(lambda: build(model), settings, chosen.ranks, device)
    return [f"{made.tokens:,} tokens at once on each of {chosen.ranks} ranks", *made.lines()]


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="memory")
    def compose(config: DictConfig) -> None:
        chosen = MemorySettings(int(config.memory.ranks), str(config.memory.device))
        try:
            told = lines(to_settings(config, configuration.overrides(), configuration.choices()), chosen)
        except Exception as error:
            print(failure.message(error, started=False), file=sys.stderr)
            sys.exit(1)
        print("\n".join(told))

    configuration.run_main(compose, "memory", configuration.texts_of(Configuration))


if __name__ == "__main__":
    main()
