"""A user's own module in the working directory, where PYTHONSAFEPATH keeps that folder off sys.path."""

import importlib
import sys
from pathlib import Path

import pytest

from longreach.launch.configuration import working_directory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    working_directory.use()
    working_directory.use()
    return tmp_path


def test_a_module_and_a_package_of_the_working_directory_are_found_last(here: Path) -> None:
    (here / "users_own_mixer.py").write_text("WHERE = __file__")
    (here / "users_own_package").mkdir()
    (here / "users_own_package" / "mixer.py").write_text("WHERE = __file__")
    (here / "yaml.py").write_text("raise AssertionError")
    assert str(here / "users_own_mixer.py") == importlib.import_module("users_own_mixer").WHERE
    assert str(here / "users_own_package" / "mixer.py") == importlib.import_module("users_own_package.mixer").WHERE
    sys.modules.pop("yaml", None)
    assert hasattr(importlib.import_module("yaml"), "safe_load")


def test_the_checkouts_folders_do_not_stand_in_for_packages_of_their_names(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(working_directory.__file__).resolve().parents[2])
    finder = working_directory.WorkingDirectoryFinder()
    for name in ("kernels", "models", "parallel", "trainer", "launch", "conf"):
        assert finder.find_spec(name) is None
    monkeypatch.chdir(here)
    (here / "kernels.py").write_text("")
    assert finder.find_spec("kernels") is not None
