"""Bench: a reduced model, the cases that it is tried on, and the ranks that try it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ranks.settings import spans_of
from . import work
from .cases import Case, make_cases
from .model import layer_names
from .ranks import Ranks
from .report import Report, Row
from .truth import Result
from .work import Topology

LIMIT_SECONDS = 300.0  # for one function on the ranks, on a machine that is busy with other work


class Bench:
    """A topology on this machine: `data_ranks * sequence` ranks, started when they run their first function.

    truths: what the model gives for each of `cases` in float64, once that has been computed.
    """

    def __init__(self, topology: Topology, data_ranks: int, report: Report, prepare: str | None) -> None:
        self.topology, self.report, self.prepare = topology, report, prepare
        self.sequence, self.spans, self.data_ranks = topology.parallel.sequence, spans_of(topology.parallel), data_ranks
        self.device = torch.device("cuda" if topology.cuda else "cpu")
        self.names = layer_names(self.model(torch.float64))
        self.cases = make_cases(self.sequence, self.spans, topology.model["vocabulary"])
        self.truths: list[Result] = []
        self.ranks: Ranks | None = None

    @property
    def longest(self) -> int:
        """The number of the case with the longest document: the losses of indexers are 0 where few blocks are seen."""
        return max(range(len(self.cases)), key=lambda number: max(map(max, self.cases[number].lengths)))

    def model(self, dtype: torch.dtype) -> Any:
        """The model with the same initial values as on the ranks."""
        return work.filled(self.topology, dtype).to(self.device)

    def add(self, row: Row) -> None:
        self.report.rows.append(row)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank. Raises RankFailure, and starts others when it is called again."""
        if self.ranks is None:
            self.ranks = Ranks(self.data_ranks * self.sequence, cuda=self.device.type == "cuda", prepare=self.prepare)
            self.run(work.configure, self.topology)
        try:
            return self.ranks.run(function, *args, timeout=LIMIT_SECONDS)
        except BaseException:
            self.close()
            raise

    def share(self, function: Callable[..., dict[int, Any]], jobs: list[Any]) -> list[list[Any]]:
        """For each job the results of the ranks that shared it, in their order; the data ranks take turns."""
        answers = self.run(function, jobs)
        shared = []
        for number in range(len(jobs)):
            first = number % self.data_ranks * self.sequence
            shared.append([answers[first + rank][number] for rank in range(self.sequence)])
        return shared

    def ran(self, dtype: str) -> str:
        """The implementations that the ranks' ops have chosen, and the type."""
        chosen: dict[str, str] = {}
        for answer in self.run(work.backends):
            chosen.update(answer)
        return f"{', '.join(sorted(set(chosen.values()))) or 'torch'}, {dtype}"

    def close(self) -> None:
        """Ends the ranks."""
        if self.ranks is not None:
            self.ranks.close()
            self.ranks = None

    def in_pairs(self) -> list[tuple[Case, Result]]:
        """Cases and their truths."""
        return list(zip(self.cases, self.truths, strict=True))
