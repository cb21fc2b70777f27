"""A checkpoint with its attention in another form: the same logits where that is exact, and good for init_from."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException
from safetensors.torch import load_file

from longreach.kernels.documents import Documents
from longreach.launch import configuration
from longreach.launch.build import build
from longreach.launch.configuration import to_schema
from longreach.launch.convert import ConvertSettings, convert
from longreach.launch.export import ExportSettings, export
from longreach.launch.generate import load
from longreach.models import hf
from longreach.models.language_model import LanguageModel
from longreach.parallel.sequence import Sequence
from longreach.trainer.checkpoint.checkpoint import load_weights
from longreach.trainer.checkpoint.choice import read_config
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


def test_a_model_that_came_without_a_tokenizer_goes_back_without_one(tmp_path):
    """In another form it is a checkpoint of ours, which is converted again."""
    full = {"_target_": MIXER, "_partial_": True, "heads": 4, "kv_heads": 4}
    saved = save_own(tmp_path / "step-00000003", MODEL | {"pattern": ["full"], "mixers": {"full": full}})
    export(ExportSettings(str(saved), str(tmp_path / "theirs")))
    for file in (*(tmp_path / "theirs").glob("tokenizer*"), *(tmp_path / "theirs").glob("special_tokens*")):
        file.unlink()
    given = {"from_": str(tmp_path / "theirs"), "to": str(tmp_path / "grouped")}
    grouped = convert(ConvertSettings("grouped", kv_heads=1, **given))
    back = convert(ConvertSettings(from_=str(grouped), to=str(tmp_path / "back")))
    assert (back / "model.safetensors").is_file()
    assert not (back / "tokenizer.json").exists()


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


def test_some_layers_take_a_form_and_the_others_stay(saved, tmp_path, capsys):
    """MoBA but in the last layer, as its authors train it; mixers beside others have their name in their weights'."""
    settings = {**MODEL, "pattern": ["far+near", "far"], "mixers": dict(MODEL["mixers"])}
    beside = save_own(tmp_path / "step-00000004", settings)
    small = {"block_size": 2, "top_k": 2}
    for source, pattern in (
        (saved, ["near", "far_moba", "near", "far"]),
        (beside, ["far_moba+near", "far_moba", "far_moba+near", "far"]),
    ):
        options = {"mixers": ["far"], "layers": ":-1", "mixer": small, "from_": str(source)}
        out = convert(ConvertSettings("moba", to=str(tmp_path / f"out-{source.name}"), **options))
        lines = capsys.readouterr().out.splitlines()
        assert all(line.endswith(": exact at positions below 4 of a document") for line in lines)
        assert len(lines) == sum("moba" in each for each in pattern)
        model = yaml.safe_load((out / "config.yaml").read_text())["model"]
        assert model["pattern"] == pattern
        assert model["mixers"]["far"] == MODEL["mixers"]["far"]
        before, after = logits(source), logits(out)
        torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-9, rtol=1e-9)
        assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-6


THEIRS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 6},
}
SMALL = {
    "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "bos_token_id": 7, "eos_token_id": [256, 9], "pad_token_id": 5,
    "of_a_tool": {"kept": 1},
}  # fmt: skip


def save_theirs(path: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of Hugging Face with a tokenizer, a chat template and generation settings."""
    config = {**SMALL, **THEIRS[family], "model_type": family}
    settings = hf.known_families()[family].settings(config)
    files = path.with_name(f"{path.name}-files")
    byte_tokenizer().save(files)
    (files / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    model = Made(settings)
    said = {name: value for name, value in SMALL.items() if "token" in name}
    hf.write(
        model.weights(model.model), settings, path, hf.tokenizer_files(files), max_positions=96, family=family,
        dtype=dtype, origin=config, generation={"temperature": 0.5, **said}, shard_bytes=3000,
    )  # fmt: skip
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", THEIRS)
def test_a_model_of_hugging_face_comes_out_as_it_went_in_and_in_other_shards(tmp_path, family):
    theirs = save_theirs(tmp_path / "theirs", family)
    out = convert(ConvertSettings(from_=str(theirs), to=str(tmp_path / "out"), shard_bytes=10_000))
    before, after = tensors_of(theirs), tensors_of(out)
    assert {x.dtype for x in before.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(list(out.glob("*.safetensors"))) < len(list(theirs.glob("*.safetensors")))
    beside = [
        path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file() and "safetensors" not in path.name
    ]
    assert len(beside) == 6
    assert all((out / name).read_bytes() == (theirs / name).read_bytes() for name in beside)


def test_experts_of_hugging_face_become_a_checkpoint_one_by_one(tmp_path):
    """With the buffers that only a checkpoint of ours has."""
    theirs = save_theirs(tmp_path / "theirs", "qwen3_moe")
    out = convert(ConvertSettings("moba", mixer={"block_size": 16}, from_=str(theirs), to=str(tmp_path / "out")))
    expected, found = build(hf.read_settings(theirs)), build(read_config(out)["model"])
    hf.load(theirs, expected)
    load_weights(out, found)
    ours, held = ({**dict(x.named_parameters()), **saved_buffers(x)} for x in (found, expected))
    assert ours.keys() == held.keys()
    assert any("shares" in name for name in ours)
    assert all(torch.equal(ours[name], held[name]) for name in ours)


def test_what_a_model_says_besides_goes_through_forms_and_formats(tmp_path):
    """From Hugging Face to a checkpoint with other heads, to Hugging Face and to another family."""
    theirs = save_theirs(tmp_path / "theirs", "llama", torch.float32)
    before = json.loads((theirs / "config.json").read_text())
    own = convert(ConvertSettings("grouped", kv_heads=1, from_=str(theirs), to=str(tmp_path / "own")))
    direct = convert(
        ConvertSettings("grouped", kv_heads=1, family="llama", from_=str(theirs), to=str(tmp_path / "direct"))
    )
    shutil.rmtree(theirs)
    first = export(ExportSettings(checkpoint=str(own), path=str(tmp_path / "first")))
    second = convert(ConvertSettings(from_=str(own), to=str(tmp_path / "second"), max_positions=128))
    last = convert(ConvertSettings(from_=str(second), to=str(tmp_path / "last"), family="mistral", dtype="float16"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (direct, first, second, last)]
    assert configs[0] == {**before, "num_key_value_heads": 1}
    assert configs[1] == configs[0]  # the tokenizer's end is one of those that it said, and its BOS is none
    assert configs[2] == {**configs[0], "max_position_embeddings": 128}
    kept = {"bos_token_id": 7, "eos_token_id": [256, 9], "pad_token_id": 5, "max_position_embeddings": 128}
    assert configs[3].items() >= kept.items()
    assert (configs[3]["model_type"], configs[3]["torch_dtype"]) == ("mistral", "float16")
    for folder in (direct, first, second, last):
        said = json.loads((folder / "generation_config.json").read_text())
        assert said == {"temperature": 0.5, "bos_token_id": 7, "eos_token_id": [256, 9], "pad_token_id": 5}
        assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
        assert (folder / "additional_chat_templates" / "tools.jinja").is_file()
        assert (folder / "tokenizer.json").is_file()
    assert all(torch.equal(x, tensors_of(direct)[name]) for name, x in tensors_of(second).items())


def test_a_keyword_of_python_is_a_setting_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", "from=a b", "to=out"])
    texts = configuration.texts_of(ConvertSettings)
    configuration.run_main(lambda: None, "convert", texts)
    assert sys.argv[1:] == ["from_='a b'", "to='out'"]

    def refuse() -> None:
        raise ConfigCompositionException("Key 'fromm' not in 'ConvertSettings', which has from_")

    with pytest.raises(SystemExit):
        configuration.run_main(refuse, "convert", texts)
    said = capsys.readouterr().err
    assert "Did you mean from or form?" in said
    assert "from_" not in said
