"""Checks: the results of ranks compared with the expected ones, as rows of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ....parallel.layout import Layout
from ..cases import Case
from ..report import FAIL, PASS, RELATIVE, Row
from ..truth import Call, Result

LAYOUT = re.compile(r"\d+ (?:span\(s\)|spans) of \d+")
EXACT = 1e-9  # of float64 results that differ by the order of sums alone


class Difference(NamedTuple):
    """A relative error, and the place where it is."""

    error: float
    where: str


def relative(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected entry (or `floor` if that is larger); inf if not finite."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.double(), expected.double()
    if not got.numel():
        return 0.0
    difference, scale = float((got - expected).abs().max()), max(float(expected.abs().max()), floor)
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest error; of equal ones the first."""
    return max(differences, key=lambda d: d.error, default=Difference(0.0, ""))


def first_over(differences: Iterable[Difference], limit: float) -> Difference:
    """The first error above the limit, for places in the order of the computation; else the largest."""
    listed = list(differences)
    return next((d for d in listed if not d.error <= limit), worst(listed))


def row(
    check: str,
    differences: Iterable[Difference],
    limit: float,
    ran: str,
    precedence: int,
    *,
    first: bool = False,
    unit: str = RELATIVE,
) -> Row:
    """A verdict on the worst of the errors; with `first`, for places in the order of the computation, the first."""
    differences = list(differences)
    shown = first_over(differences, limit) if first else worst(differences)
    passed = shown.error <= limit
    verdict, extent = (PASS, "") if passed else (FAIL, _extent(differences, limit))
    return Row(check, verdict, shown.error, limit, shown.where, ran, precedence, unit, extent)


def _extent(differences: list[Difference], limit: float) -> str:
    """How many of the comparisons fail, and in which layouts."""
    failing = [d for d in differences if not d.error <= limit]
    every, wrong = (
        dict.fromkeys(LAYOUT.findall(" ".join(d.where for d in listed))) for listed in (differences, failing)
    )
    text = f"{len(failing)} of {len(differences)} comparisons"
    if len(every) < 2:
        return text
    return f"{text}, in {'every layout' if len(wrong) == len(every) else 'layouts of ' + ', '.join(wrong)}"


def together(parts: list[Result], layout: Layout) -> Result:
    """The result for whole rows from those of the ranks that share them."""
    return Result(
        loss=torch.stack([part.loss.double() for part in parts]).sum(),
        targets=sum(part.targets for part in parts),
        gradients={name: sum_of([part.gradients[name] for part in parts]) for name in parts[0].gradients},
        layers=[layout.unshard(list(outputs)) for outputs in zip(*(part.layers for part in parts), strict=True)],
        hidden=layout.unshard([part.hidden for part in parts]),
        reports={path: sum_of([part.reports[path] for part in parts]) for path in parts[0].reports},
        choices={path: layout.unshard([part.choices[path] for part in parts]) for path in parts[0].choices},
        lists=[layout.unshard(list(each)) for each in zip(*(part.lists for part in parts), strict=True)],
    )


def sum_of(tensors: list[Tensor]) -> Tensor:
    """In float32 at least."""
    return torch.stack([t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]).sum(0)


def of_loss(got: Result, expected: Result, case: Case) -> Difference:
    """Sum of the token losses, sums of auxiliary ones, and number of targets."""
    if got.targets != expected.targets:
        return Difference(math.inf, f"{got.targets} targets in place of {expected.targets}; {case.name}")
    of_reports = [
        Difference(relative(got.reports[path], value), f"auxiliary loss {path}; {case.name}")
        for path, value in expected.reports.items()
    ]
    return worst([Difference(relative(got.loss, expected.loss), f"loss; {case.name}"), *of_reports])


def of_layers(got: Result, expected: Result, names: list[str], case: Case) -> list[Difference]:
    """Outputs of the mixers in their order; padding has no meaning."""
    return [
        Difference(relative(a[case.inside], b[case.inside]), f"output of {name}; {case.name}")
        for name, a, b in zip(names, got.layers, expected.layers, strict=True)
    ]


def of_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> list[Difference]:
    """Every parameter's; one that is zero but for rounding is measured by the largest of all."""
    floor = 1e-4 * max(float(g.abs().max()) for g in expected.values())
    return [Difference(relative(got[name], g, floor), f"{name}; {what}") for name, g in expected.items()]


def of_norms(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative root mean square error of each parameter's gradient."""
    floor = 1e-4 * max(float(g.norm()) for g in expected.values())
    return {name: rms(got[name], g, floor) for name, g in expected.items()}


def rms(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Root mean square error over that of the expected values; inf if not finite."""
    error = float((got.double() - expected.double()).norm())
    return error / max(float(expected.double().norm()), floor, 1e-300) if math.isfinite(error) else math.inf


def not_rounded_right(got: Tensor, expected: Tensor) -> float:
    """The share of entries that are not the expected float64 values rounded once to the type of `got`."""
    return float((got != expected.to(got.dtype)).double().mean()) if got.numel() else 0.0


def call_results(call: Call, parts: list[list[Tensor]], layout: Layout) -> list[Tensor]:
    """[output, gradients] of an op for whole rows from those of the ranks."""
    whole = [_of_every_rank(parts) if call.of_the_row else layout.unshard([part[0] for part in parts])]
    for index, split in enumerate(call.per_token(layout.length), 1):
        mine = [part[index] for part in parts]
        whole.append(layout.unshard(mine) if split else sum_of(mine))
    return whole


def _of_every_rank(parts: list[list[Tensor]]) -> Tensor:
    """The value that all ranks share; not a number where they differ."""
    first, *others = (part[0] for part in parts)
    for other in others:
        first = torch.where((first == other) | (first.isnan() & other.isnan()), first, math.nan)
    return first
