"""The cases that stand for a product of settings."""

import itertools

import pytest
from covering import pairwise, slow_but

SETTINGS = {"a": 1, "b": 2, "c": 3}, ("x", "y"), (True, False), range(4)


def marks(parameter):
    return [mark.name for mark in parameter.marks]


def test_any_two_values_meet_and_no_case_is_lost():
    every = pairwise(*SETTINGS)
    product = itertools.product((1, 2, 3), ("x", "y"), (True, False), range(4))
    assert [parameter.values for parameter in every] == list(product)
    chosen = [parameter.values for parameter in every if not marks(parameter)]
    assert all(marks(parameter) in ([], ["many"]) for parameter in every)
    assert 12 <= len(chosen) <= 16
    for one, other in itertools.combinations(range(4), 2):
        met = {(case[one], case[other]) for case in chosen}
        assert met == {(case[one], case[other]) for case in (parameter.values for parameter in every)}


def test_names_of_values_are_those_of_cases_and_what_is_not_run_often_is_slow():
    every = pairwise(*SETTINGS, often=("b", "3"))
    assert every[0].id == "a-x-True-0"
    for parameter in every:
        often = parameter.values[0] == 2 or parameter.values[3] == 3
        assert marks(parameter) in ([] if often else ["slow"], ["many"])


def test_what_is_no_case_is_left_out():
    every = pairwise((1, 2, 3), (1, 2, 3), range(2), where=lambda one, other, third: one <= other)
    assert {parameter.values[:2] for parameter in every} == {(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)}
    chosen = [parameter.values for parameter in every if not marks(parameter)]
    assert {case[:2] for case in chosen} == {parameter.values[:2] for parameter in every}
    assert len({case[1:] for case in chosen}) == 6


def test_all_but_those_named_are_slow():
    every = slow_but(["b"], {"a": 1, "b": 2})
    assert [(parameter.id, parameter.values, marks(parameter)) for parameter in every] == [
        ("a", (1,), ["slow"]), ("b", (2,), []),
    ]  # fmt: skip


def test_one_setting_has_no_pairs():
    with pytest.raises(ValueError, match="two"):
        pairwise((1, 2))
