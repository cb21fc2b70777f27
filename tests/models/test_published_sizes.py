"""Published sizes have the published number of parameters, and docs/models.md says so."""

import re

import pytest
from published_sizes import COMMAND, FIRST_LINE, HEADING, PAGE, parameters, published, row

from longreach.launch.configuration import model_sizes

SIZES = published()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_has_the_published_number_of_parameters(name):
    size = SIZES[name]
    here = parameters(name, size.vocabulary)
    print(f"{name}: {here:,} parameters, {size.parameters:,} published")
    assert here == pytest.approx(size.parameters, rel=0.01)
    assert row(name, size, here) in PAGE.read_text().splitlines(), f"run {COMMAND}"


def test_the_table_lists_the_published_sizes_alone():
    listed = re.findall(r"^\| `(.+?)` \|", PAGE.read_text().removeprefix(HEADING), re.MULTILINE)
    assert listed == [model_sizes()[name] for name in SIZES], f"run {COMMAND}"
    assert PAGE.read_text().startswith(HEADING), f"run {COMMAND}"


def test_the_first_line_of_a_published_size_is_read():
    line = "# Mamba 130M: 129,135,360 parameters published, vocabulary 50,280. state-spaces/mamba-130m-hf"
    said = FIRST_LINE.fullmatch(line)
    assert said.groups() == ("Mamba 130M", "129,135,360", "50,280", "state-spaces/mamba-130m-hf")
