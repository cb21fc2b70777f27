"""The settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..requirements import at_least


@dataclass
class CheckpointSettings:
    """Checkpoints: when, how many, and which one to start from."""

    every: int = 500  # steps, and at the end; 0 = never
    keep: int = 2  # the newest so many, and all at the ends of stages; of wsd also the newest from before its decay
    milestones: int = 0  # those after every so many steps stay for ever; 0: none. A multiple of checkpoint.every
    # Training stops for seconds instead of minutes; what it costs is memory of the host, which GPU machines have.
    asynchronous: bool = True  # written while training goes on, from a copy on the host: 12 bytes per parameter
    resume: str = "auto"  # auto: the newest good one of run.dir; none; or the path of one, for the run's first start

    def check(self) -> None:
        """Raises ValueError for what cannot be; which checkpoints there are is seen later (see `choice`)."""
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.milestones", self.milestones, 0)
        if self.milestones and (not self.every or self.milestones % self.every):
            raise ValueError(
                f"checkpoint.milestones must be a multiple of checkpoint.every, {self.every}; got {self.milestones}. "
                "Only a checkpoint that is saved can stay"
            )
