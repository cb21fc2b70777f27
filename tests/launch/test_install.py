"""The installer never touches torch, and the scripts are at least shell."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "launch" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINES = [
    "# comment",
    "torch==2.13.0",
    'triton==3.7.1 ; platform_system == "Linux"',
    "wandb==0.31.0",
    "rich==15.0.0",
    "",
]


def test_only_what_is_missing_is_pinned_and_torch_stays(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.12.1+cu130", "triton": "3.6.0", "rich": "13.9"}
    monkeypatch.setattr(install, "installed", there.get)
    assert install.constraints(LINES) == ["torch==2.12.1+cu130", "triton==3.6.0", "wandb==0.31.0"]
    monkeypatch.setattr(install, "installed", {}.get)
    assert install.constraints(LINES) == LINES[1:5]


def test_nothing_is_installed_where_nothing_is_missing(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.missing(ROOT, "dev") == []
    assert install.wanted(ROOT, "dev") == []  # another run of the scripts is quick
    real = install.installed
    monkeypatch.setattr(install, "installed", lambda name: None if name == "wandb" else real(name))
    assert [line.partition(">")[0] for line in install.wanted(ROOT, None)] == ["wandb"]
    monkeypatch.setattr(install, "installed", lambda name: None)
    assert install.wanted(ROOT, "dev") == ["-e", f"{ROOT}[dev]"]


def test_sources_are_built_as_if_the_scripts_had_set_nothing(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An old pip runs setup.py, which imports what lies beside it: with PYTHONSAFEPATH it would not find that."""
    seen = {}

    def run(command: list[str], env: dict[str, str], cwd: str) -> subprocess.CompletedProcess[str]:
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(install, "wanted", lambda *_: ["deepspeed"])
    monkeypatch.setattr(install, "installer", lambda: ["pip", "install"])
    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.sys, "argv", ["install.py", str(ROOT)])
    install.main()
    assert "PYTHONSAFEPATH" not in seen["env"]
    assert seen["command"][-1] == "deepspeed"


def test_every_direct_requirement_is_pinned(install: ModuleType) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    required = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["hf"],
        *project["optional-dependencies"]["oracles"],
    ]
    names = {line.partition(">")[0].strip() for line in required if not line.startswith("longreach[")}
    assert names <= pinned


@pytest.mark.parametrize("script", sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]))
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
