"""Profiler: a window of steps recorded by torch.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from ..callback import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer


class Profiler(Callback):
    """Records steps start .. start+steps−1, counted from 1, into `folder`: per rank a trace for Perfetto and a table.

    start = 0 records nothing.
    """

    def __init__(self, start: int, steps: int, folder: Path, rank: int, device: torch.device) -> None:
        self.first, self.last, self.folder, self.rank = start, start + steps - 1, folder, rank
        self._activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._profile: profile | None = None

    def before_step(self, trainer: Trainer) -> None:
        if self.first and trainer.step + 1 == self.first:
            self._profile = profile(activities=self._activities, record_shapes=True)
            self._profile.__enter__()

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.last:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also where the run ends inside the window."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        self.folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json.gz"))
        table = self._profile.key_averages().table(sort_by=self._sort, row_limit=40)
        (self.folder / f"rank-{self.rank}.txt").write_text(table + "\n", encoding="utf-8")
        self._profile = None
