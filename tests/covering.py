"""Few cases of many: of a product of settings, such that any two values meet in one; or such that all parts occur."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

import pytest


def pairwise(
    *settings: Iterable[Any], often: Collection[str] = (), where: Callable[..., bool] = lambda *values: True
) -> list[Any]:
    """A parameter for each case of the product of `settings`, which are values, or values by name, if it is one.

    Cases that show no new pair of values have the marker `many`. Where `often` is given, the others are slow, but for
    those that hold a value of one of these names. where: whether some values are a case. Raises ValueError for fewer
    than two settings.
    """
    if len(settings) < 2:
        raise ValueError(f"settings must be two or more; got {len(settings)}")
    named = [list((each if isinstance(each, dict) else {str(x): x for x in each}).items()) for each in settings]
    cases = [
        case
        for case in itertools.product(*(range(len(each)) for each in named))
        if where(*(each[number][1] for each, number in zip(named, case, strict=True)))
    ]
    missing, chosen = set[Any]().union(*map(_pairs, cases)), set()
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        chosen.add(best)
        missing -= _pairs(best)
    parameters = []
    for case in cases:
        names, values = zip(*(each[number] for each, number in zip(named, case, strict=True)), strict=True)
        rarely = pytest.mark.slow if often and not set(often) & set(names) else ()
        marks = rarely if case in chosen else pytest.mark.many
        parameters.append(pytest.param(*values, id="-".join(names), marks=marks))
    return parameters


def slow_but(often: Collection[str], cases: dict[str, Any]) -> list[Any]:
    """A parameter for each of the cases, which are given by name; all but those named in `often` are slow."""
    rarely = {name: () if name in often else pytest.mark.slow for name in cases}
    return [pytest.param(case, id=name, marks=rarely[name]) for name, case in cases.items()]


def few_with_all(parts: Mapping[str, Set[Any]]) -> list[str]:
    """Names that together have all parts that any has, chosen one by one: the next has most of the parts missing."""
    chosen, missing = list[str](), set[Any]().union(*parts.values())
    while missing:
        chosen.append(max(sorted(parts), key=lambda name: len(parts[name] & missing)))
        missing -= parts[chosen[-1]]
    return chosen


def _pairs(case: tuple[int, ...]) -> set[Any]:
    """The values of any two settings, each by the number of the setting and its own."""
    return set(itertools.combinations(enumerate(case), 2))
