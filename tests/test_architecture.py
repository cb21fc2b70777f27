"""The structure that the project promises: dependency order, who may import what, what the wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "parallel", "models", "trainer", "launch"]
PACKAGES = [*LAYERS, "conf"]


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a module imports, relative imports resolved into `longreach.…`."""
    package = ("longreach", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.slow  # `make check` runs the linter itself
def test_imports_go_one_way_and_deepspeed_stays_in_the_engine() -> None:
    """The contracts of [tool.importlinter] in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache", "--config", ROOT / "pyproject.toml"], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


def test_kernels_and_parallel_import_torch_triton_and_the_standard_library_only() -> None:
    allowed = {"torch", "triton", "longreach", "flash_attn", "flash_attn_interface", *sys.stdlib_module_names}
    for path in modules("kernels", "parallel"):
        wrong = [name for name in imports(path) if name.split(".")[0] not in allowed]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_torch_distributed_stays_in_parallel_and_trainer() -> None:
    for path in modules("kernels", "models", "launch"):
        text = path.read_text()
        assert "torch.distributed" not in text.replace("torch.distributed.run", ""), path
        if "distributed" in text:
            wrong = [name for name in imports(path) if name.startswith("torch.distributed")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_strategies_know_protocols_and_no_op() -> None:
    known = {
        "attend", "blocks", "documents", "gathered", "masks", "operation", "problem", "recurrence", "serial", "windows",
    }  # fmt: skip
    for path in modules("parallel/strategies"):
        used = {name.split(".")[2] for name in imports(path) if name.startswith("longreach.kernels.")}
        assert used <= known, f"{path.relative_to(ROOT)} imports {used - known}"


def test_transformers_classes_are_oracles_as_defined() -> None:
    """Imported elsewhere than by tests/definitions.py, they may run a library's kernels for all tests that follow."""
    imported = re.compile(r"transformers\.models\.\S+\.modeling_(?!auto\b)")
    assert [path.name for path in modules("tests") if imported.search(path.read_text())] == ["definitions.py"]


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    wrong = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in modules(*PACKAGES, "tests", "benchmarks") if path.name in wrong]


def test_modules_stay_readable() -> None:
    for path in modules(*LAYERS):
        lines = len(path.read_text().splitlines())
        assert lines <= 400 or path.name == "triton.py", f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent for path in modules(*PACKAGES))
    crowded = {str(folder.relative_to(ROOT)): size for folder, size in folders.items() if size > 15}
    assert not crowded, f"more than 15 Python files: {crowded}. Split by family"


def private_names(path: Path) -> set[str]:
    """`module._name` for every private name that a module takes from a module of another folder."""
    folder, found, imported = ("longreach", *path.relative_to(ROOT).parent.parts), set(), {}
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                imported[alias.asname or alias.name] = name
                if is_private(alias.name) and module.startswith("longreach.") and not same_folder(module, folder):
                    found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id, "")
            if is_module(module) and not same_folder(module, folder):
                found.add(f"{module}.{node.attr}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def is_module(dotted: str) -> bool:
    place = ROOT.joinpath(*dotted.split(".")[1:])
    return dotted.startswith("longreach.") and (place.is_dir() or place.with_suffix(".py").is_file())


@cache
def same_folder(dotted: str, folder: tuple[str, ...]) -> bool:
    """Whether a module lies in the folder, or is the folder's own package."""
    place = ROOT.joinpath(*dotted.split(".")[1:])
    return (place if place.is_dir() else place.parent) == ROOT.joinpath(*folder[1:])


def test_nothing_imports_private_names_of_another_folder() -> None:
    offenders = {str(path.relative_to(ROOT)): names for path in modules(*PACKAGES) if (names := private_names(path))}
    assert not offenders, f"make the name public, or move it: {offenders}"


def test_kernels_and_parallel_import_in_no_circle() -> None:
    """Imports at the top of a module; what a function imports when it first runs may lead back."""
    paths = {
        ".".join(["longreach", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in modules("kernels", "parallel")
    }
    ways = {}
    for name, path in paths.items():
        package, ways[name] = ("longreach", *path.relative_to(ROOT).parent.parts), set()
        for node in parsed(path).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                module = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                several = [f"{module}.{alias.name}" for alias in node.names]
                ways[name] |= {other if other in paths else module for other in several}
    while ends := {name for name, others in ways.items() if not others & ways.keys()}:
        ways = {name: others for name, others in ways.items() if name not in ends}
    assert not ways, f"modules that import each other: {sorted(ways)}"


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_setting_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that nothing left over from an earlier build gets in
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"longreach/{path.relative_to(ROOT)}" for path in modules(*PACKAGES)} | {"longreach/__init__.py"}
    expected |= {f"longreach/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert expected <= names, sorted(expected - names)
    top_level = {name.split("/")[0] for name in names}
    assert all(name == "longreach" or name.endswith(".dist-info") for name in top_level), top_level
    assert not [name for name in names if name.startswith("longreach/tests")]
