"""A checkpoint with its attention in another form: the same logits where that is exact, and good for init_from."""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.launch.configuration import to_schema
from longreach.launch.convert import ConvertSettings, convert
from longreach.launch.generate import load
from longreach.models.language_model import LanguageModel
from longreach.parallel.sequence import Sequence
from longreach.trainer.checkpoint.checkpoint import load_weights
from longreach.trainer.checkpoint.origin import Origin
from longreach.trainer.checkpoint.rewriting import rewrite
from longreach.trainer.checkpoint.source import Source
from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.engine import saved_buffers

MIXER = "longreach.models.mixers.softmax.softmax_attention.SoftmaxAttention"
MODEL: dict[str, Any] = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "vocabulary": 257,
    "width": 16,
    "depth": 4,
    "pattern": ["near", "far"],
    "mixers": {
        "near": {"_target_": MIXER, "_partial_": True, "heads": 4, "kv_heads": 4, "window": 5},
        "far": {"_target_": MIXER, "_partial_": True, "heads": 4, "kv_heads": 2, "rope_fraction": 0.5},
    },
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 16},
}


class Made(Source):
    """A model from the seed, as what a checkpoint is made of."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.run, self.state = settings, {"model": settings}, {"step": 3}
        self.model = build(deepcopy(settings))
        self.model.initialise(0)

    def weights(self, model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from saved_buffers(self.model).items()

    def write_beside(self, folder: Path) -> None:
        byte_tokenizer().save(folder / "tokenizer")
        Origin(longest_row=16).save(folder)


def save_own(path: Path, settings: dict[str, Any] = MODEL) -> Path:
    """A checkpoint of ours."""
    made = Made(settings)
    rewrite(made, path, made.model, settings, made.weights(made.model))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model with full attention in every second layer."""
    return save_own(tmp_path / "step-00000003")


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    model, _ = load(path, torch.device("cpu"))
    tokens = torch.arange(24).view(2, 12)
    return model.double()(tokens, Sequence.single(Documents.whole(2, 12)))


def test_logits_are_the_same_where_it_is_exact(saved, tmp_path, capsys):
    settings = ConvertSettings("latent", ["far"], from_=str(saved), to=str(tmp_path / "out"))
    out = convert(settings)
    assert capsys.readouterr().out.splitlines() == [f"blocks.{layer}.mixer: exact" for layer in (1, 3)]
    torch.testing.assert_close(logits(out), logits(saved), atol=1e-9, rtol=1e-9)
    model = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert model["mixers"]["near"] == MODEL["mixers"]["near"]
    assert model["mixers"]["far"]["_target_"].endswith("LatentAttention")
    began = build(model)
    assert load_weights(out, began)["step"] == 3  # as by init_from
    with pytest.raises(ValueError, match="to must be a new or empty folder"):
        convert(settings)


def test_errors_of_every_layer_are_printed(saved, tmp_path, capsys):
    out = convert(ConvertSettings("grouped", kv_heads=1, from_=str(saved), to=str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"blocks.{layer}.mixer" for layer in range(4)]
    for number, line in enumerate(lines):  # of as good as independent heads, four or two
        keys, values = map(float, re.findall(r"off by ([\d.e-]+)", line))
        expected = (3 / 4 if number % 2 == 0 else 1 / 2) ** 0.5
        assert keys == pytest.approx(expected, rel=0.15)
        assert values == pytest.approx(expected, rel=0.15)
    model, _ = load(out, torch.device("cpu"))
    assert [part.kv_heads for part in model.mixers] == [1] * 4
    convert(ConvertSettings("latent", ["far"], latent_rank=3, from_=str(out), to=str(tmp_path / "more")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("keys off by " in line and "values off by " in line for line in lines)


def test_the_command_line_names_these_settings():
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        composed = hydra.compose("convert", ["from_=a", "to=b", "form=latent", "mixers=[far]", "latent_rank=8"])
    expected = ConvertSettings("latent", ["far"], latent_rank=8, from_="a", to="b")
    assert to_schema(composed, ConvertSettings) == expected


def test_what_cannot_be_is_refused_and_leaves_nothing(saved, tmp_path):
    good = {"from_": str(saved), "to": str(tmp_path / "out"), "form": "latent"}
    for changes, message in (
        ({"from_": None}, "from must be given"),
        ({"to": None}, "to must be a new folder"),
        ({"form": "sparse"}, "form must be one of grouped, latent, moba, infllm_v2, nsa; got 'sparse'"),
        ({"form": None, "layers": ":2"}, "layers must be left out with form=null"),
        ({"layers": "3"}, "layers must be a slice first:stop; got '3'"),
        ({"layers": "4:"}, "layers must leave some of the 4 that there are; got 4:"),
        ({"dtype": "float16"}, "dtype must be left out with a form and no family"),
        ({"dtype": "int8", "family": "llama"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"mixer": {"block_size": 4}}, "mixer must be left out with form=latent"),
        ({"form": "moba"}, "model.mixers.near: window must be None for form=moba"),
        (
            {"form": "moba", "mixers": ["far"], "mixer": {"heads": 4}},
            "mixer must hold settings .*, block_size, .*heads",
        ),
        ({"form": "nsa", "mixers": ["far"], "mixer": {"compression_hidden": 7}}, "hidden must be at least 8.*got 7"),
        ({"form": "grouped"}, "kv_heads must be given with form=grouped"),
        ({"kv_heads": 1}, "kv_heads must be left out with form=latent"),
        ({"form": "grouped", "kv_heads": 1, "latent_rank": 4}, "latent_rank must be left out with form=grouped"),
        ({"mixers": ["other"]}, "mixers must be names of near, far; got other"),
        ({}, "model.mixers.near: window must be None for form=latent"),
        ({"form": "grouped", "kv_heads": 3}, "model.mixers.near: kv_heads must be a smaller divisor of the 4"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(ConvertSettings(**good | changes))
        assert not list(tmp_path.glob("*out*"))
