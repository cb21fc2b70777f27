"""Families of flash-linear-attention against its classes, which run on its own plain functions here."""

from pathlib import Path

import pytest
from checkpoint_checks import (
    check_greedy_decoding,
    check_logits,
    check_logits_in_float64_and_settings,
    check_loss_and_gradients,
    check_two_ranks,
    check_what_is_written,
)
from checkpoints import Imported, few_checkpoints, filled
from fla_models import CASES, config_of, greedy, model_of, plain_functions

from longreach.models import hf

LIBRARY = "flash-linear-attention"
FAMILIES = {name: family for name, family in hf.known_families().items() if family.library == LIBRARY}
# Those that run on ranks and decode: one of each family, with most of what it has.
RUN = (
    "gla_conv", "retnet", "delta_net", "gated_deltanet_sigmoid", "kda", "gsa_conv", "hgrn2", "hgrn", "rwkv7",
    "transformer", "forgetting_transformer",
)  # fmt: skip


def family_named(case):
    return max((name for name in FAMILIES if case.startswith(name)), key=len)


def cases(fast, of=CASES):
    """The cases, as a parameter of the fixture `imported`; those that are not among `fast` are slow."""
    parameters = [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in of]
    return pytest.mark.parametrize("imported", parameters, indirect=True)


@pytest.fixture(scope="module")
def imported(request, tmp_path_factory):
    family = family_named(request.param)
    with plain_functions():
        reference = filled(model_of(config_of(family, CASES[request.param])))
        yield Imported(request.param, family, reference, tmp_path_factory.mktemp("theirs"))


def test_every_family_has_a_case():
    assert set(FAMILIES) <= set(CASES)
    assert set(FAMILIES) == {family_named(case) for case in RUN}
    folder = Path(hf.__file__).parent / "families" / "flash_linear_attention"
    assert set(FAMILIES) == {path.stem for path in folder.glob("[a-z]*.py")}


@cases(fast=FAMILIES)
def test_logits_are_theirs_in_float64_and_settings_come_back(imported):
    check_logits_in_float64_and_settings(imported)


@cases(fast=few_checkpoints(LIBRARY)[:2])
def test_logits_are_theirs(imported):
    check_logits(imported)


@cases(fast=few_checkpoints(LIBRARY)[:2])
def test_loss_and_gradients_are_theirs_in_float64(imported, tmp_path):
    check_loss_and_gradients(imported, tmp_path)


@cases(fast=few_checkpoints(LIBRARY)[:2])
def test_what_is_written_is_what_was_read_and_they_load_it(imported, tmp_path):
    check_what_is_written(imported, type(imported.reference), tmp_path)


@cases(fast=(), of=RUN)
def test_two_ranks_give_what_one_device_and_they_give(imported):
    check_two_ranks(imported)


@cases(fast=("hgrn2",), of=RUN)
def test_greedy_decoding_is_theirs(imported):
    check_greedy_decoding(imported, lambda prompt, count: greedy(imported.reference, prompt, count), 12)
