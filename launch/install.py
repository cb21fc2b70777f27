"""Installs what the environment lacks of LongReach's requirements, and never replaces its torch.

Run by launch/environment.sh as `python launch/install.py REPOSITORY [extra]`, before anything is installed: standard
library only. What is already there and within the ranges of pyproject.toml stays; what is missing comes in the version
of constraints.txt; torch and triton are pinned to the installed version.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

KEPT = ("torch", "triton")


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def constraints(lines: list[str]) -> list[str]:
    """The pins of what is not installed yet, and torch and triton as they are."""
    chosen = []
    for line in lines:
        name, pin, _ = line.partition("==")
        name = name.strip()
        if not pin or name.startswith("#"):
            continue
        version = installed(name)
        if version is None:
            chosen.append(line)
        elif name in KEPT:
            chosen.append(f"{name}=={version}")
    return chosen


def missing(repository: Path, extra: str | None) -> list[str]:
    """The requirements that are absent or outside their range."""
    from packaging.requirements import Requirement

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    wanted = list(project["dependencies"])
    pending = [extra] if extra else []
    while pending:
        for line in extras[pending.pop()]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                pending += requirement.extras
            else:
                wanted.append(line)
    lacking = []
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lacking.append(line)
    return lacking


def installer() -> list[str]:
    """The command that installs into this interpreter: pip, or uv where the environment came without pip."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--use-pep517"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([sys.executable, "-m", "ensurepip"], check=True, capture_output=True)
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--use-pep517"]


def wanted(repository: Path, extra: str | None) -> list[str]:
    """What to install: nothing; the checkout itself; or, where a checkout is installed already, what is missing."""
    checkout = ["-e", f"{repository}[{extra}]" if extra else str(repository)]
    if installed("longreach") is None or installed("packaging") is None:
        return checkout
    return missing(repository, extra)


def main() -> None:
    repository = Path(sys.argv[1])
    what = wanted(repository, sys.argv[2] if len(sys.argv) > 2 else None)
    if not what:
        return
    print("installing what is missing (a few minutes the first time)", flush=True)
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "constraints.txt")
        pins.write_text("\n".join(constraints(lines)) + "\n", encoding="utf-8")
        # Sources that are built with an old pip import what lies beside their setup.py.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        done = subprocess.run([*installer(), "-c", str(pins), *what], env=environment, cwd=folder)
    if done.returncode:
        torch = installed("torch")
        print(
            "the installation failed; the lines above say why. LongReach needs the ranges of pyproject.toml"
            + (f" beside the torch {torch} of this environment, which it never replaces" if torch else "")
            + ". Use another environment, or none: then .venv is made",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
