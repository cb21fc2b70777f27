"""Parts: what `gpu_check` does, in which order, and how much of its time each part may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUDGET_SECONDS = 540.0


@dataclass(frozen=True)
class Part:
    """One part of the check.

    seconds: its share of `BUDGET_SECONDS`. module: as seen from this package; its `steps(here)` lists what it does.
    workers: processes that share its steps on a GPU. Where kernels are timed it is one; elsewhere most of the time goes
    into compiling kernels on the host, and as many do it side by side as there are cores, but two.
    """

    name: str
    title: str
    seconds: float
    module: str
    workers: int = 1


PARTS = (
    Part("machine", "Machine and versions", 15, ".machine"),
    Part("ops", "Every op against float64", 120, ".ops", workers=14),
    Part("sync", "A step that never waits for the host", 40, ".waiting"),
    Part("ranks", "Ranks as threads of one process", 55, ".ranks", workers=8),
    Part("kernels", "Time of each op beside its alternatives", 100, ".timing"),
    Part("training", "Training in rows of 131,072 tokens", 165, ".training"),
    Part("tests", "Tests that need a GPU", 45, ".marked", workers=12),
)


def limit(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds for a part when `left` are left for it and those after it: by their shares, so that none is lost.

    What a part does not use is thereby shared among the later ones, and the last one gets all that is left.
    """
    return max(left, 0.0) * part.seconds / (part.seconds + sum(other.seconds for other in later))
