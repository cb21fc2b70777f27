"""Every family of Hugging Face checkpoints with drawn settings: read, run in float64, and written back."""

import tempfile
from pathlib import Path

import pytest
from checkpoint_cases import CASES, family_named
from checkpoint_draws import drawn
from checkpoints import (
    Imported,
    InFloat64,
    assert_near,
    assert_written_back,
    config_of,
    few_checkpoints,
    logits,
    own_classes,
    random_model,
    their_logits,
    tokens,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LENGTH = 39  # beyond the length that scaled positions extend
FAMILIES = [case for case in CASES if case == family_named(case)]


@pytest.fixture(scope="module", autouse=True)
def _own_classes():
    pytest.importorskip("transformers")
    with own_classes():
        yield


def check(family, data):
    reference = random_model(config_of(family, data.draw(drawn(family))))
    with tempfile.TemporaryDirectory() as scratch:
        imported = Imported("drawn", family, reference, Path(scratch, "theirs"))
        with InFloat64():
            expected = their_logits(imported.theirs_in_float64, tokens(LENGTH))
        assert expected.std() > 0.1
        assert_near(family, "logits in float64", logits(imported.ours_in_float64, tokens(LENGTH)), expected, 1e-9)
        assert_written_back(imported, imported.ours_in_float64, Path(scratch, "ours"), family)


def check_drawn(family, count, phases):
    few = settings(max_examples=count, phases=phases, suppress_health_check=list(HealthCheck))
    few(given(data=st.data())(lambda data: check(family, data)))()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_models_are_those_of_transformers_and_are_written_back(family):
    check_drawn(family, 2 if family in few_checkpoints(FAMILIES) else 1, [Phase.generate])


@pytest.mark.many
@pytest.mark.parametrize("family", FAMILIES)
def test_many_drawn_models_are_those_of_transformers_and_are_written_back(family):
    check_drawn(family, 40, [Phase.generate, Phase.shrink])
