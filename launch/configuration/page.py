"""The page that --help prints: what a command does, what its settings may be chosen from, and each with its default.

Hydra's own page has no defaults and no meanings, a line for the sizes of every family, and takes seconds to find them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import keyword
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[2] / "conf"
FLAGS = ("--help", "-h")
PARTS = {"mixer": "+mixer@model.mixers.NAME", "feed_forward": "feed_forward@model.feed_forward"}
NOTE = (
    "NAME=VALUE sets one, +NAME=VALUE adds what the configuration has not yet, ~NAME takes away; --cfg job prints all."
)
OF_TRAINING = "And the settings of training: python -m longreach.launch.train --help."


def comments(schema: type) -> dict[str, str]:
    """What the source says behind each field of a dataclass."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        (definition,) = ast.parse("\n".join(lines)).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                _, _, comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
                found[node.target.id] = comment.strip()
    return found


def rows(settings: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """Name, default and meaning of each setting; the model's are those of its mixers."""
    said, table = comments(type(settings)), []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        name = prefix + (field.name.rstrip("_") if keyword.iskeyword(field.name.rstrip("_")) else field.name)
        if dataclasses.is_dataclass(value):
            table += rows(value, f"{name}.")
        elif name != "model":
            table.append((name, json.dumps(value), said[field.name]))  # as YAML and the command line write it
    return table


def groups(config_name: str) -> dict[str, list[str]]:
    """What is chosen by name for a command: files of conf/, of models the sizes of each family by their short names."""
    defaults = yaml.safe_load((CONF / f"{config_name}.yaml").read_text())["defaults"]
    names = [name for entry in defaults if isinstance(entry, dict) for name in entry if " " not in name]
    found = {name: sorted(path.stem for path in (CONF / name).glob("[!_]*.yaml")) for name in names}
    if "model" in found:
        found["model"] = sorted([*found["model"], *families()])
        found |= {PARTS[name]: sorted(path.stem for path in (CONF / name).glob("*.yaml")) for name in PARTS}
    return found


def families() -> list[str]:
    """The families of models, as llama_{125m,1b,8b,tiny}."""
    found = []
    for folder in (CONF / "model").iterdir():
        if sizes := sorted(path.stem for path in folder.glob("[!_]*.yaml")):
            found.append(f"{folder.name}_{sizes[0]}" if len(sizes) == 1 else f"{folder.name}_{{{','.join(sizes)}}}")
    return found


def page(about: str, settings: Any, chosen: dict[str, list[str]], own: Sequence[str] = ()) -> str:
    """The whole page.

    about: the docstring of the command's module. own: names of the parts of `settings` to print; empty: all.
    """
    width = max(60, min(140, shutil.get_terminal_size().columns))
    lines = [*about.strip().splitlines(), ""]
    for name, options in chosen.items():
        lines += textwrap.wrap(f"{name}= {', '.join(options)}", width, subsequent_indent="    ")
    if chosen:
        lines.append("")
    for name, default, meaning in rows(settings):
        if not own or name.partition(".")[0] in own:
            start = f"{name:<34} {default:<12} "
            lines += textwrap.wrap(start + meaning, width, subsequent_indent=" " * 48, drop_whitespace=True)
    return "\n".join([*lines, "", NOTE, *([OF_TRAINING] if own else [])])
