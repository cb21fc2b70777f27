"""What the pages say is what the code does: settings, examples, the recipe for a mixer."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longreach.kernels.documents import Documents
from longreach.models.mixer import Mixer
from longreach.parallel.sequence import Sequence

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_has_the_settings_of_today() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs" / "settings.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    readme = page.README.read_text()
    assert page.updated(readme) == readme, "run python docs/settings.py"
    assert not [line for line in page.section().splitlines() if line.endswith("|  |")], "a setting has no comment"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [
        ("01_one_op.py", 1, r"alone: True\n.*gives: +True"),
        ("02_hybrid.py", 1, r"step 40: loss [0-3]\."),
        ("03_four_ranks_on_cpu.py", 4, r"relative to the largest gradient: \d\.\de-1\d"),
    ],
)
def test_an_example_runs(name: str, processes: int, expected: str) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(expected, result.stdout), result.stdout


def test_the_recipe_for_a_mixer_makes_one(tmp_path: Path) -> None:
    recipe = (ROOT / "examples" / "04_add_a_mixer.md").read_text()
    source = re.search(r"```python\n(.*?)```", recipe, re.DOTALL)[1]
    path = tmp_path / "decayed_attention.py"
    path.write_text(source)
    name = "longreach.models.mixers.decayed_attention"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mixer = module.DecayedAttention(width=32, heads=4)
    assert isinstance(mixer, Mixer)
    seq = Sequence.single(Documents.from_lengths([[5, 9]]))
    assert mixer(torch.randn(1, 14, 32), seq).shape == (1, 14, 32)
    assert mixer.mixing_flops(seq) > 0
