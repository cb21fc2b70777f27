"""Families of conf/model that together have every mixer, feed-forward layer, block and norm that any of them has."""

import re
from functools import cache
from pathlib import Path

from covering import few_with_all

MODELS = Path(__file__).resolve().parents[1] / "conf" / "model"
PARTS = re.compile(r"/((?:mixer|feed_forward)@)[\w.]+: (\w+)|_target_: ([\w.]+)|^(norm: \w+)", re.MULTILINE)


@cache
def parts_of(family: str) -> frozenset[tuple[str, ...]]:
    """What a family's _base.yaml names, and that of the family that it builds on."""
    text = (MODELS / family / "_base.yaml").read_text()
    found = frozenset(PARTS.findall(text))
    parent = re.search(r"/model/(\w+)/_base@_here_", text)
    return found | parts_of(parent[1]) if parent else found


@cache
def few_families() -> frozenset[str]:
    """For what takes seconds a model, and does alike for each of its parts."""
    return frozenset(
        few_with_all({path.parent.name: parts_of(path.parent.name) for path in MODELS.glob("*/_base.yaml")})
    )
