"""Reported: what the parts of a model report in one step, over all micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.mesh import Mesh


class Reported:
    """Auxiliary losses and sums of one step; see `longreach.models.part.Part`. Every rank makes one and calls it alike.

    weights: of the auxiliary losses, by path. counts: what each of them is divided by, over all ranks and micro-batches
    of the step; see `LanguageModel.loss_counts`. A model that reports nothing costs no exchange, and nothing here waits
    for the device.
    """

    def __init__(self, weights: Mapping[str, float], counts: Iterable[float], mesh: Mesh) -> None:
        self.weights, self.mesh = weights, mesh
        self.counts = dict(zip(weights, counts, strict=True))
        self.totals: dict[str, Tensor] = {}  # of losses and sums, over this rank's micro-batches

    def add(self, reports: Mapping[str, Tensor]) -> Tensor | None:
        """Notes the reports of one micro-batch; returns what they add to the step's loss, None for nothing."""
        for path, value in reports.items():
            wide = value.detach().double()
            self.totals[path] = self.totals[path] + wide if path in self.totals else wide
        terms = [
            self.weights[path] * reports[path].to(torch.promote_types(reports[path].dtype, torch.float32)) / count
            for path, count in self.counts.items()
            if count  # where it is 0 there is no sum
        ]
        return torch.stack(terms).sum() if terms else None

    def exchange(self) -> None:
        """Adds up the totals of all ranks."""
        if self.mesh.world_size == 1 or not self.totals:
            return
        flat = torch.cat([value.flatten() for value in self.totals.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in self.totals.values()])
        self.totals = {
            path: part.view(value.shape) for (path, value), part in zip(self.totals.items(), parts, strict=True)
        }

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses by name, without their weights: the mean over the layers that have one of this name.

        float64 scalars on the device.
        """
        values: dict[str, list[Tensor]] = {}
        for path, count in self.counts.items():
            if count:
                values.setdefault(path.rpartition(".")[2], []).append(self.totals[path] / count)
        return {name: torch.stack(of).mean() for name, of in values.items()}

    def sums(self) -> dict[str, Tensor]:
        """The sums that parts are told, by path."""
        return {path: value for path, value in self.totals.items() if path not in self.weights}
