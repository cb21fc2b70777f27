"""The settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..requirements import at_least


@dataclass
class CheckpointSettings:
    """Checkpoints: when, how many, and which one to start from."""

    every: int = 500  # steps, and at the end; 0 = never
    keep: int = 2  # the newest so many, and the last one of each stage; of wsd also the newest from before its decay
    resume: str = "auto"  # auto: the newest good one of run.dir; none; or the path of one, for the run's first start

    def check(self) -> None:
        """Raises ValueError for what cannot be; which checkpoints there are is seen later (see `choice`)."""
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
