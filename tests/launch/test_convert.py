"""A checkpoint with its attention in another form: the same logits where that is exact, and good for init_from."""

import re
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
from longreach.parallel.sequence import Sequence
from longreach.trainer.checkpoint.checkpoint import load_weights
from longreach.trainer.checkpoint.rewriting import rewrite
from longreach.trainer.checkpoint.stored import Stored
from longreach.trainer.data.tokenizers import byte_tokenizer

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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model with full attention in every second layer."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    byte_tokenizer().save(tmp_path / "run" / "tokenizer")
    model = build(deepcopy(MODEL))
    model.initialise(0)
    path = tmp_path / "step-00000003"
    rewrite(Stored(tmp_path / "run", {"step": 3}, 3, {}), path, model, MODEL, model.named_parameters())
    return path


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    model, _ = load(path, torch.device("cpu"))
    tokens = torch.arange(24).view(2, 12)
    return model.double()(tokens, Sequence.single(Documents.whole(2, 12)))


def test_logits_are_the_same_where_it_is_exact(saved, tmp_path, capsys):
    settings = ConvertSettings(str(saved), str(tmp_path / "out"), "latent", mixers=["far"])
    out = convert(settings)
    assert capsys.readouterr().out.splitlines() == [f"blocks.{layer}.mixer: exact" for layer in (1, 3)]
    torch.testing.assert_close(logits(out), logits(saved), atol=1e-9, rtol=1e-9)
    model = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert model["mixers"]["near"] == MODEL["mixers"]["near"]
    assert model["mixers"]["far"]["_target_"].endswith("LatentAttention")
    began = build(model)
    assert load_weights(out, began)["step"] == 3  # as by init_from
    with pytest.raises(ValueError, match="path must be a new or empty folder"):
        convert(settings)


def test_errors_of_every_layer_are_printed(saved, tmp_path, capsys):
    out = convert(ConvertSettings(str(saved), str(tmp_path / "out"), "grouped", kv_heads=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"blocks.{layer}.mixer" for layer in range(4)]
    for number, line in enumerate(lines):  # of as good as independent heads, four or two
        keys, values = map(float, re.findall(r"off by ([\d.e-]+)", line))
        expected = (3 / 4 if number % 2 == 0 else 1 / 2) ** 0.5
        assert keys == pytest.approx(expected, rel=0.15)
        assert values == pytest.approx(expected, rel=0.15)
    model, _ = load(out, torch.device("cpu"))
    assert [part.kv_heads for part in model.mixers] == [1] * 4
    convert(ConvertSettings(str(out), str(tmp_path / "more"), "latent", ["far"], latent_rank=3))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("keys off by " in line and "values off by " in line for line in lines)


def test_the_command_line_names_these_settings():
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        composed = hydra.compose("convert", ["checkpoint=a", "path=b", "form=latent", "mixers=[far]", "latent_rank=8"])
    assert to_schema(composed, ConvertSettings) == ConvertSettings("a", "b", "latent", ["far"], latent_rank=8)


def test_what_cannot_be_is_refused_and_leaves_nothing(saved, tmp_path):
    good = {"checkpoint": str(saved), "path": str(tmp_path / "out"), "form": "latent"}
    for changes, message in (
        ({"checkpoint": None}, "checkpoint must be given"),
        ({"path": None}, "path must be a new folder"),
        ({"form": "sparse"}, "form must be one of grouped, latent; got 'sparse'"),
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
