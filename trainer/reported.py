"""Reported: what the parts of a model report in one step, over all micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.documents import Documents
from ..models.language_model import LanguageModel
from ..parallel.mesh import Mesh
from .ranks.exchange import gather_numbers


class Reported:
    """Auxiliary losses and sums of one step; see `longreach.models.part.Part`. Every rank makes one and calls it alike.

    model: any copy, for what its parts state. batches: the documents of this rank's micro-batches; the denominators
    come from them, before the first forward. A model that reports nothing costs no exchange.
    """

    def __init__(self, model: LanguageModel, batches: Iterable[Documents], mesh: Mesh) -> None:
        self.weights, self.mesh = model.losses, mesh
        self.counts: dict[str, float] = {}
        if self.weights:
            mine = torch.zeros(len(self.weights), dtype=torch.float64)
            if mesh.sequence_rank == 0:  # ranks that share rows count them once
                for documents in batches:
                    mine += torch.tensor(model.loss_counts(documents), dtype=torch.float64)
            totals = gather_numbers(mine.tolist(), mesh).sum(0).tolist()
            self.counts = dict(zip(self.weights, totals, strict=True))
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

    def losses(self) -> dict[str, float]:
        """The auxiliary losses by name, without their weights: the mean over the layers that have one of this name."""
        values: dict[str, list[float]] = {}
        for path, count in self.counts.items():
            if count:
                values.setdefault(path.rpartition(".")[2], []).append(float(self.totals[path]) / count)
        return {name: sum(of) / len(of) for name, of in values.items()}

    def sums(self) -> dict[str, Tensor]:
        """The sums that parts are told, by path."""
        return {path: value for path, value in self.totals.items() if path not in self.weights}
