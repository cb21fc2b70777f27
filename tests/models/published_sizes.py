"""Published sizes of conf/model: `python tests/models/published_sizes.py` writes their table, docs/models.md.

The first line of such a file is
`# <published name>: 129,135,360 parameters published, vocabulary 50,280. <source>`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from model_presets import CONF, build_model

from longreach.launch.configuration import model_sizes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COMMAND = "python tests/models/published_sizes.py"
FIRST_LINE = re.compile(r"# (.+): ([\d,]+) parameters published, vocabulary ([\d,]+)\. ?(.*)")
HEADING = f"""# Published sizes

Files in `conf/model/` that are models as they were published, and their parameters: as published, and as built here
with the same vocabulary. Made by `{COMMAND}`; a test holds both to within 1 % of each other.

| `model=` | published as | parameters published | parameters here | vocabulary | source |
|---|---|---|---|---|---|
"""


class Published(NamedTuple):
    """What the first line of a size's file says."""

    name: str
    parameters: int
    vocabulary: int
    source: str


def published() -> dict[str, Published]:
    """The published sizes by the names of `model_sizes`."""
    found = {}
    for name, size in model_sizes().items():
        first = (CONF / "model" / f"{size}.yaml").read_text().splitlines()[0]
        if said := FIRST_LINE.fullmatch(first):
            numbers = (int(number.replace(",", "")) for number in said.group(2, 3))
            found[name] = Published(said[1], *numbers, said[4])
        elif "parameters published" in first:
            raise ValueError(f"the first line of {size}.yaml must be like {FIRST_LINE.pattern}; got {first!r}")
    return found


def parameters(name: str, vocabulary: int) -> int:
    """Of the model as it is built here, without data."""
    with torch.device("meta"):
        return build_model(name, vocabulary=vocabulary).parameter_count()


def row(name: str, size: Published, here: int) -> str:
    """The row of a size that has so many parameters here."""
    numbers = (f"{number:,}" for number in (size.parameters, here, size.vocabulary))
    cells = f"`{model_sizes()[name]}`", size.name, *numbers, size.source
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    rows = [row(name, size, parameters(name, size.vocabulary)) for name, size in published().items()]
    PAGE.write_text(HEADING + "".join(f"{each}\n" for each in rows))
    print(f"written to {PAGE}")
