"""The settings of a run's folder and of what the run reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..requirements import at_least, one_of

WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass
class WandbSettings:
    """Weights & Biases: `auto` is online when logged in, offline otherwise."""

    mode: str = "auto"  # or online, offline, disabled
    project: str | None = None  # where W&B files the run; null: WANDB_PROJECT, or longreach
    entity: str | None = None  # W&B team; null: WANDB_ENTITY, or your own
    name: str | None = None  # null: WANDB_NAME, or the name of run.dir


@dataclass
class LoggerSettings:
    """What the run reports while it goes; run.dir/metrics.jsonl is always written."""

    every: int | None = None  # steps whose numbers are read from the device together; null: 1 on a CPU, 10 on CUDA
    memory: bool = True  # say at the start what a step holds by part, as counted on the first rank: some seconds
    print_every: int = 10  # steps between lines where the output is not a terminal
    wandb: WandbSettings = field(default_factory=WandbSettings)

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        at_least("logger.every", self.every, 1)
        at_least("logger.print_every", self.print_every, 1)
        one_of("logger.wandb.mode", self.wandb.mode, WANDB_MODES)

    def interval(self, device_type: str) -> int:
        """Steps whose numbers are read together: each time a GPU is read it runs out of work."""
        return self.every or (10 if device_type == "cuda" else 1)


@dataclass
class RunSettings:
    """Where the run lives: null = runs/<name>/<time>, chosen by the first rank."""

    dir: str | None = None  # the run's folder; null: runs/<name>/<time>
    name: str | None = None  # null: the experiment, or the model
