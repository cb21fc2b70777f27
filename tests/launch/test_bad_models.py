"""Models that cannot be read and folders that cannot be written: one message by every command, and nothing left."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from test_convert import MODEL, save_own

from longreach.launch.build import build
from longreach.launch.convert import ConvertSettings, convert
from longreach.launch.export import ExportSettings, export
from longreach.models import hf
from longreach.parallel.mesh import Mesh
from longreach.trainer.checkpoint.checkpoint import load_weights
from longreach.trainer.preparation import check_origin, make_engine
from longreach.trainer.settings import Settings

INDEX = "model.safetensors.index.json"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROJECTION = "model.layers.1.self_attn.k_proj.weight"


def save_theirs(path: Path, **changes: Any) -> Path:
    """A small Llama in shards, as a folder of Hugging Face."""
    settings = hf.known_families()["llama"].settings({**CONFIG, **changes})
    model = build(settings)
    model.initialise(0)
    hf.write(model.named_parameters(), settings, path, max_positions=64, family="llama", shard_bytes=4000)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A good model of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    model = {**MODEL, "pattern": ["far"], "mixers": {"far": {**MODEL["mixers"]["far"], "rope_fraction": 1.0}}}
    return save_theirs(folder / "theirs"), save_own(folder / "step-00000003", model)


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def say(file: str, **changes: Any) -> Callable[[Path], None]:
    """Changes what a JSON file says; ... takes a key out."""

    def edit(folder: Path) -> None:
        said = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))

    return edit


def put(change: Callable[[torch.Tensor], torch.Tensor | None], name: str = PROJECTION) -> Callable[[Path], None]:
    """Changes a tensor in its shard; None takes it out of shard and index."""

    def edit(folder: Path) -> None:
        file = shard_of(folder, PROJECTION)
        tensors = load_file(file)
        index = json.loads((folder / INDEX).read_text())
        if (made := change(tensors[PROJECTION])) is None:
            del tensors[name], index["weight_map"][name]
        else:
            tensors[name], index["weight_map"][name] = made, file.name
        save_file(tensors, file)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def cut(folder: Path) -> None:
    file = shard_of(folder, PROJECTION)
    file.write_bytes(file.read_bytes()[:-9])


def move(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][PROJECTION] = "model-00001-of-00009.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


THEIRS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such architecture": (
        say("config.json", model_type="gpt_bigcode"),
        r"model_type must be one of .*'gpt_bigcode'",
    ),
    "no architecture": (say("config.json", model_type=...), "model_type must be one of .*; got None. Name a model"),
    "type of rope": (say("config.json", rope_scaling={"type": "su2"}), "rope_scaling.rope_type must be one of.*'su2'"),
    "quantised": (say("config.json", quantization_config={"bits": 4}), "quantization_config must be absent.*dequant"),
    "missing": (
        put(lambda x: None),
        f"theirs must hold the tensors of its config.json; got missing: {PROJECTION}. Corr",
    ),
    "unexpected": (put(lambda x: torch.ones(3), "more.bias"), "got unexpected: more.bias. Correct"),
    "misshapen": (put(lambda x: x[:4].clone()), rf"{PROJECTION} in model-\S+ of shape \[4, 16\] instead of \[8, 16\]"),
    "integers": (
        put(lambda x: x.to(torch.int8)),
        rf"{PROJECTION} of type I8 in model-\S+, where only BF16, .* dequant",
    ),
    "other config": (
        say("config.json", intermediate_size=32),
        r"up_proj.weight in \S+ of shape \[24, 16\] .* \[32, 16\]",
    ),
    "fewer layers": (say("config.json", num_hidden_layers=1), "got unexpected: model.layers.1.* and 3 more"),
    "more layers": (say("config.json", num_hidden_layers=3), "got missing: model.layers.2.* and 3 more"),
    "cut shard": (cut, r"theirs/model-\S+.safetensors must be a whole safetensors file; .*\. Download"),
    "garbage": (lambda path: shard_of(path, PROJECTION).write_bytes(b"\1\0"), "must be a whole safetensors file"),
    "no shard": (lambda path: shard_of(path, PROJECTION).unlink(), r"theirs must hold the shard \S+ .*; it is missing"),
    "no such file": (move, r"must hold the shard model-00001-of-00009.safetensors that its index names; it is missing"),
    "no index": (
        lambda path: (path / INDEX).unlink(),
        r"must hold model.safetensors or .*; got model-00001\S+, .* index",
    ),
    "index of nothing": (say(INDEX, weight_map={"a": 3}), rf"{INDEX} must hold a weight_map, of a file to each tensor"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), r"theirs/config.json must be JSON; .*Download"),
    "no object": (
        lambda path: (path / "config.json").write_text("[]"),
        "config.json must hold a JSON object; got list",
    ),
}


def starts(folder: Path) -> None:
    """What `train init_from=` does before it reads data."""
    check_origin(build, Settings(init_from=str(folder), model=own_model(folder)))


def own_model(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    return yaml.safe_load(file.read_text())["model"] if file.is_file() else {}


@pytest.mark.parametrize("fault", THEIRS)
def test_a_model_of_hugging_face_that_is_not_whole_is_refused(whole, tmp_path, fault):
    edit, message = THEIRS[fault]
    folder = Path(shutil.copytree(whole[0], tmp_path / "theirs"))
    edit(folder)
    for command in (
        lambda: convert(ConvertSettings(from_=str(folder), to=str(tmp_path / "out"))),
        lambda: convert(ConvertSettings("latent", from_=str(folder), to=str(tmp_path / "out"))),
        lambda: starts(folder),
    ):
        with pytest.raises(ValueError, match=message) as told:
            command()
        assert "\n" not in str(told.value)
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def flip(folder: Path) -> None:
    file = folder / "weights-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def resize(folder: Path) -> None:
    run = yaml.safe_load((folder / "config.yaml").read_text())
    run["model"]["feed_forward"]["hidden"] = 12
    (folder / "config.yaml").write_text(yaml.safe_dump(run))


WEIGHTS = "weights-00001-of-00001.safetensors"
OWN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed byte": (flip, rf"complete and undamaged; the bytes of \S+ in {WEIGHTS} have changed"),
    "cut file": (lambda path: (path / WEIGHTS).write_bytes(b"12345678"), rf"{WEIGHTS} has 8 of \d+ bytes"),
    "no file": (lambda path: (path / WEIGHTS).unlink(), rf"{WEIGHTS} cannot be read"),
    "no index": (lambda path: (path / "index.json").write_text("{"), "index.json cannot be read"),
    "other model": (resize, rf"gate.weight in {WEIGHTS} has shape \[16, 16\] instead of \[12, 16\]"),
}


@pytest.mark.parametrize("fault", OWN)
def test_a_checkpoint_that_is_not_whole_is_refused(whole, tmp_path, fault):
    edit, message = OWN[fault]
    folder = Path(shutil.copytree(whole[1], tmp_path / "step-00000003"))
    edit(folder)
    for command in (
        lambda: convert(ConvertSettings(from_=str(folder), to=str(tmp_path / "out"))),
        lambda: convert(ConvertSettings("grouped", kv_heads=1, from_=str(folder), to=str(tmp_path / "out"))),
        lambda: export(ExportSettings(checkpoint=str(folder), path=str(tmp_path / "out"))),
        lambda: load_weights(folder, build(own_model(folder))),  # as init_from does before any rank waits
    ):
        with pytest.raises(ValueError, match=message) as told:
            command()
        assert "step-00000003" in str(told.value)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["nowhere", "empty", "run"])
def test_what_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    message = "from must be .* a run's that has saved one" if name == "run" else "from must be a folder with a Hugging"
    with pytest.raises(ValueError, match=f"{message}.*{name}.*Check the path"):
        convert(ConvertSettings(from_=str(tmp_path / name), to=str(tmp_path / "out")))


def fill_disk(path: Path) -> None:
    """No file may be longer than that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


TARGETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "full": (fill_disk, "must be a folder that can be written; got .*out: .*File too large.*. Nothing of it is left"),
    "below a file": (
        lambda path: path.parent.write_text("here"),
        "must be a folder that can be made; got .* below a file",
    ),
    "taken": (
        lambda path: path.mkdir(parents=True) or (path / "x").touch(),
        "must be a new or empty folder; got .*out",
    ),
    "a file": (lambda path: path.parent.mkdir() or path.touch(), "must be a new or empty folder; got .*out"),
}


@pytest.mark.parametrize("fault", TARGETS)
def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(whole, tmp_path, fault):
    (theirs, own), (make, message) = whole, TARGETS[fault]
    out = tmp_path / "in" / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        make(out)
        there = sorted(tmp_path.rglob("*"))
        for setting, command in (
            ("to", lambda: convert(ConvertSettings(from_=str(theirs), to=str(out)))),
            ("to", lambda: convert(ConvertSettings("grouped", kv_heads=1, from_=str(own), to=str(out)))),
            ("path", lambda: export(ExportSettings(checkpoint=str(own), path=str(out)))),
        ):
            with pytest.raises(ValueError, match=f"^{setting} {message}"):
                command()
            assert sorted(tmp_path.rglob("*")) in (there, [*there, out.parent])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def begin(rank: int, world: int, folders: list[Path]) -> str:
    """What a rank is told that starts from its folder, on disks of their own."""
    settings = Settings(model=hf.read_settings(folders[0]), init_from=str(folders[rank]))
    try:
        make_engine(settings, build, Mesh.create(), torch.device("cpu"), resuming=False)
    except ValueError as error:
        return str(error)
    return "begun"


@pytest.mark.slow
def test_no_rank_waits_for_one_that_cannot_read_the_model(whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "theirs"))
    cut(folder)
    first, second = run_ranks(2, begin, [whole[0], folder])
    assert first == second
    assert "must be a whole safetensors file" in first
