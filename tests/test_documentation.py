"""What the pages say is what the code does: settings, examples, the recipe for a mixer."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
import yaml

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import Mixer
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import Sequence

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_settings_is_that_of_today() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs" / "settings.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = table.PAGE.read_text()
    assert "`data.sequence_length`" in page, "the markers of the table are gone"
    assert table.updated(page) == page, "run python docs/settings.py"
    assert not [line for line in table.section().splitlines() if line.endswith("|  |")], "a setting has no comment"


FOLDERS = "benchmarks|conf|docs|examples|kernels|launch|models|parallel|tests|trainer"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
SOURCES = [
    path
    for folder in FOLDERS.split("|")
    for ending in ("*.py", "*.sh", "*.yaml", "*.sbatch")
    for path in (ROOT / folder).rglob(ending)
]
MADE_BY_THE_READER = {"models/mixers/linear/decayed_attention.py", "conf/mixer/decayed_attention.yaml"}


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_every_path_that_is_named_exists(paths: list[Path]) -> None:
    assert not {path.name: wrong for path in paths if (wrong := missing_paths(path) - MADE_BY_THE_READER)}


def missing_paths(path: Path) -> set[str]:
    """The paths in a file's text that lead nowhere."""
    named = re.findall(rf"(?<![\w/.…-])(?:longreach/)?((?:{FOLDERS})/[\w/.-]*[\w/])(?![\w*…<{{])", path.read_text())
    if path in PAGES:
        named += [name for name in re.findall(r"`([\w-]+\.(?:md|py|sh))`", path.read_text()) if not own_file(name)]
    return {name for name in named if not (ROOT / name).exists()}


def own_file(name: str) -> bool:
    """Whether a file of this name is somewhere in the repository, or is one that a reader would write."""
    return name.startswith("my_") or any(source.name == name for source in [*PAGES, *SOURCES])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_dotted_name_exists(path: Path) -> None:
    for name in set(re.findall(r"longreach(?:\.\w+)+", path.read_text())):
        if "decayed_attention" not in name:
            head, _, last = name.rpartition(".")
            assert find_spec(name) or hasattr(importlib.import_module(head), last), name


def find_spec(name: str) -> object:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def test_the_readme_leads_to_every_example() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [path.name for path in (ROOT / "examples").glob("0*") if f"examples/{path.name}" not in readme]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [
        ("01_one_op.py", 1, r"alone: True\n.*the whole: +True"),
        ("02_hybrid.py", 1, r"step 40: loss [0-3]\."),
        ("03_four_ranks_on_cpu.py", 4, r"relative to the largest gradient: \d\.\de-1\d"),
        ("05_longer_context.py", 1, r"short: 256 positions, 6\.\d+ .*\nlong: 1024 positions, [45]\."),
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


RECIPE = (ROOT / "examples" / "04_add_a_mixer.md").read_text()


def code(language: str) -> list[str]:
    """The recipe's blocks of a language, without the indent that those within a list have."""
    return [textwrap.dedent(block) for block in re.findall(rf"```{language}\n(.*?)```", RECIPE, re.DOTALL)]


def decayed_attention(tmp_path: Path) -> type[Mixer]:
    """The class that the recipe writes, in the place that it says."""
    path = tmp_path / "decayed_attention.py"
    path.write_text(code("python")[0])
    name = "longreach.models.mixers.linear.decayed_attention"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DecayedAttention


def test_the_recipe_for_a_mixer_makes_one(tmp_path: Path) -> None:
    mixer = decayed_attention(tmp_path)(width=32, heads=4)
    assert isinstance(mixer, Mixer)
    seq = Sequence.single(Documents.from_lengths([[5, 9]]))
    assert mixer(torch.randn(1, 14, 32), seq).shape == (1, 14, 32)
    assert mixer.mixing_flops(seq) > 0


def test_the_recipe_for_a_mixer_outside_the_checkout_makes_a_hybrid(module_folder: Path) -> None:
    """The module with `from longreach.…`, the two YAML files, the pattern, and the override of the command line."""
    source = code("python")[0]
    for dots, package in (("....", "longreach."), ("...", "longreach.models.")):
        source = source.replace(f"from {dots}", f"from {package}")
    (module_folder / "my_mixers.py").write_text(source)
    mixer, base = (yaml.safe_load(block) for block in code("yaml"))
    assert mixer.pop("_target_") == "longreach.models.mixers.linear.decayed_attention.DecayedAttention"
    assert base["defaults"][1] == {"/mixer@mixers.decayed": "decayed_attention"}
    (command,) = (block for block in code("bash") if "launch.doctor" in block)
    assert re.search(r"model.pattern='(.*?)'", command)[1] == f"[{','.join(base['pattern'])}]"
    override = yaml.safe_load(re.search(r"mixers.decayed='(.*?)'", command)[1])
    decayed = hydra.utils.instantiate({**mixer, **override})
    model = LanguageModel(
        vocabulary=16,
        width=32,
        depth=4,
        pattern=base["pattern"],
        mixers={"decayed": decayed, "softmax": partial(SoftmaxAttention, heads=4)},
        feed_forward=partial(SwiGLU, hidden=32),
    )
    model.initialise(seed=0)
    tokens = torch.arange(14)[None]
    loss, count = model(tokens, Sequence.single(Documents.from_lengths([[5, 9]])), tokens)
    loss.backward()
    assert int(count) == 14
    assert all(p.grad is not None for p in model.parameters())


def test_the_recipe_for_initial_values_is_what_the_model_calls(tmp_path: Path) -> None:
    names = {"torch": torch, "Tensor": torch.Tensor}
    exec(code("python")[1], names)
    mixer = decayed_attention(tmp_path)(width=32, heads=4)
    mixer.register_parameter("scale", torch.nn.Parameter(torch.zeros(3)))
    mixer.initialise_parameter = partial(names["initialise_parameter"], mixer)

    def mine(*, width: int) -> Mixer:
        return mixer

    model = LanguageModel(vocabulary=16, width=32, depth=1, pattern=["mine"], mixers={"mine": mine})
    model.initialise(seed=0)
    assert torch.equal(mixer.scale, torch.ones(3))
    assert mixer.query.weight.std() > 0
