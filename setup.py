"""Finds the packages, which pyproject.toml cannot do for a repository whose root is the package."""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "parallel", "models", "trainer", "launch", "conf")

found = find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
setup(packages=["longreach", *(f"longreach.{name}" for name in found)])
