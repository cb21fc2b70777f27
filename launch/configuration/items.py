"""Items of lists in overrides, as `stages.1.steps=5`: what is wrong with the name of one, in one message."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import PurePath


def is_about_one(error: BaseException) -> bool:
    """Whether it is an error of OmegaConf's that has no class of its own: of an item whose number is no integer."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TypeError | ValueError) and "omegaconf" in PurePath(frames[-1].filename).parts


def explained(message: str, overrides: Sequence[str]) -> str | None:
    """The message for an item that is not there, one whose number is none, and a new key of a stage; or None."""
    if stage := re.search(r"Could not override '(stages\.\d+\.[\w.]+)'", message):
        given = next((item for item in overrides if item.startswith(f"{stage[1]}=")), stage[1])
        return f"{stage[1]} must get what its entry does not have in this form by +; got {given}. Write +{given}"
    absent = re.search(r"Error merging override (\S+)=.*\nlist index out of range", message)
    no_number = re.search(r"^(?:Index|invalid literal for int\(\) with base 10:) '(.*?)'", message)
    if absent:
        given = next((item for item in overrides if item.startswith(f"{absent[1]}=")), absent[1])
    elif no_number:
        given = next((item for item in overrides if no_number[1] in item.partition("=")[0].split(".")), no_number[1])
    else:
        return None
    name = given.partition("=")[0].lstrip("+~")
    return f"{name} must name an item that the list has by its number, counted from 0; got {given}. Or give all of it"


def with_dots(override: str) -> str | None:
    """`stages[1].steps=5` as `stages.1.steps=5`; None where nothing is written so."""
    name, equals, value = override.partition("=")
    dotted = re.sub(r"\[(\d+)\]", r".\1", name)
    return f"{dotted}{equals}{value}" if dotted != name else None
