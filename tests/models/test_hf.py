"""Hugging Face checkpoints: transformers is the oracle, both ways."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    ORIGINAL,
    SMALL,
    InFloat64,
    config_of,
    family_of,
    load,
    logits,
    random_model,
    saved,
    their_logits,
    tokens,
    write,
)
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from longreach.kernels.documents import Documents
from longreach.kernels.pointwise import ROPE_SCALINGS, RopeScaling, Rotation
from longreach.models import hf
from longreach.models.hf import families
from longreach.models.hf.components import Node
from longreach.models.hf.config import ConfigReader, ConfigWriter
from longreach.models.language_model import expand_pattern
from longreach.parallel.sequence import Sequence

FOUR = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 1e4}
YARN_DEEPSEEK = dict(YARN, mscale=1.2, mscale_all_dim=0.7, beta_fast=24.0, beta_slow=2.0)
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 3 * ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.5, 6.0],
    "rope_theta": 1e4,
}
CASES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_one_head_a_group": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama_llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_yarn": ("llama", {"rope_parameters": YARN_DEEPSEEK, "head_dim": 16}),
    "llama_linear": ("llama", {"rope_parameters": LINEAR}),
    "llama_dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama_longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_tied_without_window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral_llama3_head_dim": (
        "mistral",
        {"sliding_window": 9, "head_dim": 16, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
    ),
    "mistral_odd_heads": (
        "mistral",
        {"sliding_window": None, "head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-2}),
    "qwen2_tied_yarn": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": YARN | {"truncate": False}, "num_key_value_heads": 4},
    ),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2_mixed_windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "rms_norm_eps": 1e-2}),
    "qwen3_tied_yarn": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3_llama3_bias": ("qwen3", {"head_dim": 16, "rope_parameters": LLAMA3, "attention_bias": True}),
    "qwen3_odd_heads": ("qwen3", {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen3_windows": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3_mixed_windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture
def reference(request):
    return random_model(config_of(*CASES[request.param]))


every_case = pytest.mark.parametrize("reference", CASES, indirect=True)
some_cases = pytest.mark.parametrize("reference", ["llama_llama3", "qwen3_tied_yarn"], indirect=True)


@every_case
def test_logits_are_those_of_transformers(reference, tmp_path):
    ours = load(saved(reference, tmp_path))
    expected = their_logits(reference, tokens())
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-4, rtol=1e-4)


@every_case
def test_logits_are_those_of_transformers_in_float64(reference, tmp_path):
    ours = load(saved(reference, tmp_path), torch.float64)
    with InFloat64():
        expected = their_logits(reference.double(), tokens())
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-9, rtol=1e-9)


@every_case
def test_transformers_loads_what_is_written(reference, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = hf.read_settings(saved(reference, tmp_path / "theirs"))
    model = instantiate(settings, _convert_="all")
    model.initialise(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # larger than at the start of training, so that the logits are not all alike
    path = write(model, settings, tmp_path / "ours", family=family_of(reference))
    theirs, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs) is type(reference)
    assert theirs.config.max_position_embeddings == 4 * ORIGINAL
    expected = logits(model, tokens())
    assert expected.std() > 0.1
    torch.testing.assert_close(their_logits(theirs, tokens()), expected, atol=1e-4, rtol=1e-4)


@every_case
def test_round_trip_keeps_every_bit_and_setting(reference, tmp_path):
    theirs = saved(reference, tmp_path / "theirs")
    ours = write(load(theirs), hf.read_settings(theirs), tmp_path / "ours", family=family_of(reference))
    before, after = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert hf.read_settings(ours) == hf.read_settings(theirs)
    again = type(reference.config).from_pretrained(ours)
    for key in ("layer_types", "sliding_window", "head_dim", "tie_word_embeddings", "mlp_bias", "attention_bias"):
        if (reference.config.model_type, key) != ("qwen2", "head_dim"):  # which it reads, though it does not define it
            assert getattr(again, key, None) == getattr(reference.config, key, None), key


@pytest.mark.parametrize("reference", ["qwen3"], indirect=True)
def test_modules_of_multi_token_prediction_are_left_out(reference, tmp_path):
    settings = hf.read_settings(saved(reference, tmp_path / "theirs"))
    model = instantiate(settings | {"multi_token_prediction": 1}, _convert_="all")
    model.initialise(seed=1)
    path = write(model, settings | {"multi_token_prediction": 1}, tmp_path / "ours")
    torch.testing.assert_close(logits(load(path), tokens()), logits(model, tokens()), atol=0, rtol=0)


@pytest.mark.parametrize("reference", ["mistral", "qwen2_mixed_windows"], indirect=True)
def test_packed_documents_have_the_logits_that_each_has_alone(reference, tmp_path):
    ours = load(saved(reference, tmp_path))
    row, lengths = tokens()[:1], (35, 5, 40)
    with torch.no_grad():
        packed = ours(row, Sequence.single(Documents.from_lengths([lengths])))
    expected = torch.cat([their_logits(reference, part) for part in row.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", FOUR)
@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in ("num_key_value_heads", "sliding_window", "rms_norm_eps") for value in (..., None)]
    + [(key, ...) for key in ("head_dim", "max_window_layers", "tie_word_embeddings", "rope_theta", "hidden_act")],
)
def test_absent_and_null_keys_mean_what_transformers_makes_of_them(model_type, key, value):
    transformers = pytest.importorskip("transformers")
    given = {
        "num_attention_heads": 32,
        "hidden_size": 512,
        "num_hidden_layers": 30,
        "num_key_value_heads": 16,
        "sliding_window": 99,
        "head_dim": 64,
        "max_window_layers": 7,
        "use_sliding_window": model_type in ("qwen2", "qwen3"),
        "tie_word_embeddings": True,
        "rope_theta": 5e4,
    }
    config = tiny_config(**{**given, "model_type": model_type, key: value})
    ours = settings_of(config)
    try:
        theirs = transformers.CONFIG_MAPPING[model_type](**config)
    except Exception:
        assert value is None  # which their strict classes refuse for some keys
        return
    mixers = [ours["mixers"][name] for name in expand_pattern(ours["pattern"], 30, list(ours["mixers"]))]
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if model_type == "mistral" else ""] * 30
    assert [mixer["window"] for mixer in mixers] == [
        theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds
    ]
    for mixer in ours["mixers"].values():
        assert mixer["kv_heads"] == theirs.num_key_value_heads
        assert mixer["head_dim"] == getattr(theirs, "head_dim", 512 // 32)
        assert mixer["rope_base"] == theirs.rope_parameters["rope_theta"]
    assert ours["norm_eps"] == theirs.rms_norm_eps
    assert ours["tied_embeddings"] == theirs.tie_word_embeddings


@some_cases
def test_shards_both_ways(reference, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = saved(reference, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 2
    model = load(theirs)
    ours = write(model, hf.read_settings(theirs), tmp_path / "ours", shard_bytes=20_000)
    shards = sorted(ours.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in shards)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(ours)
    for (name, a), (_, b) in zip(reference.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("reference", ["qwen3"], indirect=True)
def test_a_type_asked_for_is_written_and_read(reference, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = saved(reference, tmp_path / "theirs")
    ours = write(load(theirs), hf.read_settings(theirs), tmp_path / "ours", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(ours, dtype="auto").dtype == torch.bfloat16
    for (name, a), (_, b) in zip(load(ours).named_parameters(), load(theirs).named_parameters(), strict=True):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b.bfloat16().float()), name


def test_the_tokenizer_is_carried_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    theirs = tmp_path / "theirs"
    tokenizer.save_pretrained(theirs)
    transformers.GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(theirs)
    settings = settings_of(tiny_config())
    files = hf.tokenizer_files(theirs)
    ours = write(instantiate(settings, _convert_="all"), settings, tmp_path / "ours", files=files)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        file.name for file in ours.iterdir()
    }
    again = transformers.AutoTokenizer.from_pretrained(ours)
    assert again.encode("b a b") == [1, 0, 1]
    assert again.eos_token_id == 2
    assert transformers.AutoModelForCausalLM.from_pretrained(ours).generation_config.temperature == 0.5


def test_what_a_config_says_besides_is_kept_and_not_what_training_changed(tmp_path):
    """As transformers 5 writes it: the rope's settings and the type under other names, which would win over ours."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        **SMALL, rope_parameters=rope, dtype="bfloat16", pad_token_id=5, initializer_range=0.01, of_a_tool={"kept": 1}
    )
    origin = json.loads(config.to_json_string(use_diff=False))
    assert {"rope_parameters", "dtype"} <= origin.keys()
    settings = settings_of(origin)
    settings["mixers"]["full"]["rope_base"] = 1e6  # a later stage's
    model = instantiate(settings, _convert_="all")
    ours = write(model, settings, tmp_path / "ours", origin=origin, generation={"pad_token_id": 5})
    written = transformers.AutoConfig.from_pretrained(ours)
    assert written.rope_parameters["rope_theta"] == 1e6
    assert written.rope_parameters["factor"] == 8.0
    assert (written.pad_token_id, written.initializer_range, written.of_a_tool) == (5, 0.01, {"kept": 1})
    assert (written.max_position_embeddings, written.dtype) == (4 * ORIGINAL, torch.float32)
    assert written.architectures == ["LlamaForCausalLM"]
    assert json.loads((ours / "generation_config.json").read_text()) == {"pad_token_id": 5}
    # Of another family nothing is kept.
    ours = write(model, settings, tmp_path / "other", origin={**origin, "model_type": "qwen3"})
    assert "of_a_tool" not in json.loads((ours / "config.json").read_text())


# What follows needs no transformers: config.json as it is found on disk.


def tiny_config(**changes):
    config = dict(
        SMALL, model_type="llama", hidden_act="silu", architectures=["LlamaForCausalLM"], torch_dtype="bfloat16"
    )
    config = {**config, "num_hidden_layers": 2, **changes}
    return {key: value for key, value in config.items() if value is not ...}


def settings_of(config):
    return hf.known_families()[config["model_type"]].settings(config)


@pytest.fixture
def four_families(monkeypatch):
    """Which family is chosen, and what none expresses, must not depend on the families that are still to come."""
    known = {name: family for name, family in hf.known_families().items() if name in FOUR}
    monkeypatch.setattr(hf, "known_families", lambda: known)


def rope_of(**changes):
    mixers = settings_of(tiny_config(**changes))["mixers"]
    (mixer,) = mixers.values()
    return mixer["rope_base"], mixer["rope_scaling"]


def test_rotary_settings_in_the_old_and_the_new_format():
    llama3 = {
        "kind": "llama3",
        "factor": 8.0,
        "original_length": 8192,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
    }
    written = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert rope_of() == (10000.0, None)
    assert rope_of(rope_theta=500000) == (500000.0, None)
    assert rope_of(rope_theta=5e5, rope_scaling=None) == (5e5, None)
    assert rope_of(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == (5e5, None)
    assert rope_of(rope_theta=5e5, rope_scaling=dict(written, rope_type="llama3")) == (5e5, llama3)
    assert rope_of(rope_parameters=dict(written, rope_type="llama3", rope_theta=5e5)) == (5e5, llama3)
    assert rope_of(rope_scaling={"type": "linear", "factor": 2}) == (1e4, {"kind": "linear", "factor": 2.0})


def test_yarn_takes_transformers_defaults():
    expected = {"kind": "yarn", "factor": 4.0, "original_length": 32, "beta_fast": 32.0, "beta_slow": 1.0}
    assert rope_of(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}) == (
        1e4,
        expected,
    )
    # Without a length in the scaling, the config's own: first the key beside it, then the model's length.
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert rope_of(rope_scaling=scaling, original_max_position_embeddings=32) == (1e4, expected)
    assert rope_of(rope_scaling=scaling)[1]["original_length"] == SMALL["max_position_embeddings"]
    without_factor = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    assert rope_of(rope_scaling=without_factor) == (1e4, expected)


def test_scalings_by_length_take_the_lengths_of_the_config():
    dynamic = {"kind": "dynamic", "factor": 2.0, "original_length": SMALL["max_position_embeddings"]}
    assert rope_of(rope_scaling={"type": "dynamic", "factor": 2}, rope_theta=5e5) == (5e5, dynamic)
    scaling = {name: value for name, value in LONGROPE.items() if name not in ("factor", "rope_theta")}
    longrope = {
        "kind": "longrope",
        "factor": SMALL["max_position_embeddings"] / 48,
        "original_length": 48,
        "short_factors": LONGROPE["short_factor"],
        "long_factors": LONGROPE["long_factor"],
    }
    assert rope_of(rope_scaling=scaling, original_max_position_embeddings=48) == (1e4, longrope)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_scaling_by_length_computes_what_transformers_does_at_that_length(kind, tmp_path):
    """And what is written computes so at every length."""
    from transformers import AutoModelForCausalLM

    scaling = DYNAMIC if kind == "dynamic" else LONGROPE | {"original_max_position_embeddings": ORIGINAL}
    reference = random_model(config_of("llama", {"rope_parameters": scaling, "max_position_embeddings": ORIGINAL}))
    folder = saved(reference, tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"rope_scaling.length must be at least .*; got {ORIGINAL} for one of 80"):
        logits(load(folder), tokens())
    settings = hf.read_settings(folder)
    settings["mixers"]["full"]["rope_scaling"]["length"] = tokens().shape[1]
    model = instantiate(settings, _convert_="all")
    hf.load(folder, model)
    expected = their_logits(reference, tokens())
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-4, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(write(model, settings, tmp_path / "ours"))
    for length in (ORIGINAL // 2, 80):
        row = tokens()[:, :length]
        torch.testing.assert_close(their_logits(theirs, row), logits(model, row), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(load(tmp_path / "ours"), tokens()), logits(model, tokens()))


SCALINGS = {
    "linear": {"factor": 3.0},
    "ntk": {"factor": 3.0},
    "dynamic": {"factor": 3.0, "original_length": 24},
    "llama3": {"factor": 4.0, "original_length": 24},
    "yarn": {"factor": 4.0, "original_length": 24},
    "longrope": {"factor": 4.0, "original_length": 24, "short_factors": [1.0, 1.5], "long_factors": [2.0, 4.0]},
}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_every_scaling_is_written_by_every_family_or_refused_by_its_name(kind):
    """Of the layers of every kind that a family has, alone and together, with the same scaling."""
    wrote = []
    for name, family in hf.known_families().items():
        mixers = {part: mixer.read(ConfigReader(SMALL)) for part, mixer in family.mixers.items()}
        turning = [part for part, mixer in mixers.items() if {"rope_base", "rope_scaling"} <= mixer.keys()]
        turning = [part for part in turning if mixers[part]["rope_base"] is not None]
        for part in turning:
            fraction = mixers[part].get("rope_fraction", 1.0)
            size = (
                mixers[part].get("head_dim")
                or mixers[part].get("key_dim")
                or SMALL["hidden_size"] // SMALL["num_attention_heads"]
            )
            dims = mixers[part].get("rope_dim") or round(size * fraction)
            scaling = {"kind": kind, **SCALINGS[kind]}
            if kind == "longrope":
                scaling |= {key: [each[0]] * (dims // 2 - 1) + [each[1]] for key, each in _factors(scaling).items()}
            mixer = mixers[part] | {"rope_scaling": scaling}
            writer = ConfigWriter({"hidden_size": 32})
            family.mixers[part].write(writer, "mixer", Node.of(mixer, width=32, depth=3, norm_eps=1e-5))
            for rule in family.rules:
                rule.write(writer)
            if family.library != "transformers":  # whose config.json has settings of attention for layers that have it
                family.layers.write(writer, [part, getattr(family.layers, "native", part), part])
            if writer.problems:
                assert any("rope_scaling" in problem for problem in writer.problems), (name, writer.problems)
                continue
            written = family.current(family.written(writer.config))
            again = family.mixers[part].read(ConfigReader({**SMALL, **written}))
            one, other = (Rotation(dims, x["rope_base"], _scaling_of(x)).frequencies() for x in (mixer, again))
            torch.testing.assert_close(one[0], other[0], atol=0.0, rtol=1e-6)
            assert one[1] == pytest.approx(other[1], rel=1e-12)
            wrote.append(name)
    assert set(wrote) >= {"llama", "mixtral", "qwen3", "deepseek_v3", "gemma3_text", "cohere2"}


def _factors(scaling):
    return {key: value for key, value in scaling.items() if key.endswith("_factors")}


def _scaling_of(mixer):
    return RopeScaling(**mixer["rope_scaling"]) if mixer["rope_scaling"] else None


def test_keys_without_meaning_are_named_in_a_warning(caplog):
    settings_of(tiny_config(is_llama_config=True, _name_or_path="here"))
    assert "is_llama_config" in caplog.text
    assert "_name_or_path" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'.*got 'gelu'"),
        ({"hidden_size": ...}, "hidden_size must be a positive integer; got None"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer; got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4; got 3"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "num_attention_heads must divide hidden_size = 32; got 5",
        ),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number; got -1.0"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false; got 'yes'"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.*got 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent.*dequantised"),
        ({"rope_interleaved": True}, "rope_interleaved must be absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0; got 0.5"),
        ({"rope_scaling": {"type": "proportional"}}, "rope_scaling.rope_type must be one of.*got 'proportional'"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type must be one of.*got 'axial'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 4}}, "of type dynamic must not hold alpha"),
        ({"rope_scaling": dict(LONGROPE, long_factor=4)}, "rope_scaling.long_factor must be a list of .*; got 4"),
        ({"rope_scaling": dict(LONGROPE, short_factor=[0, 1])}, "rope_scaling.short_factor must be a positive number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a positive number; got None"),
        ({"rope_scaling": dict(YARN, truncate="no")}, "rope_scaling.truncate must be true or false; got 'no'"),
        ({"rope_scaling": dict(YARN, short_factor=[1.0])}, "rope_scaling of type yarn must not hold short_factor"),
        ({"rope_parameters": {"full_attention": dict(LLAMA3)}}, "rope_parameters must be one for all layers"),
        ({"rope_parameters": dict(LLAMA3, low_freq_factor=0)}, "low_freq_factor must be a positive number; got 0"),
        ({"layer_types": ["full_attention"]}, "layer_types must name one of .* for each of 2 layers"),
        (
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types must name one of full_attention for each of 2 layers",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2},
            "layer_types must be all full_attention unless use_sliding_window is true",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must name one of sliding_attention for each of 2 layers",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer; got 0"),
        ({"model_type": "qwen2", "max_window_layers": "1"}, "max_window_layers must be an integer; got '1'"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias must be absent; got True"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
            "sliding_window must be a positive integer; got 0",
        ),
        ({"hidden_act": "relu", "rms_norm_eps": 0}, "rms_norm_eps must be .*; hidden_act must be"),
    ],
)
def test_unsupported_models_are_refused_by_the_name_of_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tiny_config(**changes))


@pytest.fixture
def folder(tmp_path):
    """A model as a folder, written by us."""
    return written(tmp_path / "model")


def written(path, **changes):
    settings = settings_of(tiny_config(**changes))
    model = instantiate(settings, _convert_="all")
    model.initialise(seed=0)
    return write(model, settings, path)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_all_named(folder):
    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["lm_head.weight"] = torch.zeros(60, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints hold it

    change(folder, edit)
    with pytest.raises(ValueError, match="must hold the tensors of its config") as error:
        load(folder)
    assert "missing: model.layers.1.mlp.up_proj.weight;" in str(error.value)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias;" in str(error.value)
    assert "lm_head.weight in model.safetensors of shape [60, 32] instead of [61, 32]" in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_quantised_tensors_are_refused(folder):
    change(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        ValueError, match=r"lm_head.weight of type F8_E4M3 in model.safetensors, where only .* save the model deq"
    ):
        load(folder)


def test_a_second_copy_of_tied_embeddings_must_be_equal(tmp_path):
    folder = written(tmp_path / "model", tie_word_embeddings=True)
    expected = load(folder)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(folder)
    assert torch.equal(model.head.weight, expected.embedding.weight)
    assert model.head.weight is model.embedding.weight
    change(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head.weight unlike model.embed_tokens.weight, though config.json ties"):
        load(folder)


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    folder = written(tmp_path / "model", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        load(folder)


def test_another_model_than_the_checkpoint_describes_is_refused(folder):
    settings = {**hf.read_settings(folder), "tied_embeddings": True}
    with pytest.raises(ValueError, match=r"they differ in head.weight. Leave the model's settings to init_from"):
        hf.load(folder, instantiate(settings, _convert_="all"))


def test_truncated_files_and_missing_shards(tmp_path, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors must be a whole safetensors file"):
        load(folder)
    settings = hf.read_settings(folder)
    sharded = write(instantiate(settings, _convert_="all"), settings, tmp_path / "sharded", shard_bytes=10_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = "model-00001-of-00001.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must hold the shard model-00001-of-00001.safetensors that its index names"):
        load(sharded)
    index["weight_map"]["extra"] = index["weight_map"]["lm_head.weight"]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name tensors that .* holds; got extra"):
        load(sharded)


@pytest.mark.usefixtures("four_families")
def test_pickles_hub_names_and_other_families_are_refused(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"with pytorch_model.bin. Pickles are not read: convert them"):
        load(folder)
    with pytest.raises(ValueError, match=r"init_from must be a folder .* got meta-llama/Llama-3.2-1B. Download"):
        hf.read_settings("meta-llama/Llama-3.2-1B")
    with pytest.raises(ValueError, match=r"init_from must be a folder with config.json; got .* without it"):
        hf.read_settings(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"model_type must be one of llama, mistral, qwen2, qwen3; got 'mamba'"):
        hf.read_settings(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON"):
        hf.read_settings(folder)


def test_weights_are_loaded_one_gathered_parameter_at_a_time(folder):
    """ZeRO-3 as the loader sees it: empty parameters that are whole only inside `gather`."""
    expected = load(folder)
    model = instantiate(hf.read_settings(folder), _convert_="all")
    held, order, open_now = {}, [], []
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)

    @contextmanager
    def gather(parameters):
        open_now.extend(parameters)
        assert len(open_now) == 1
        (parameter,) = parameters
        parameter.data = torch.full(parameter.ds_shape, torch.nan)
        yield
        held[parameter] = parameter.data
        parameter.data = torch.empty(0)
        order.append(parameter)
        open_now.clear()

    hf.load(folder, model, gather)
    assert [id(p) for p in order] == [id(p) for p in model.parameters()]
    for (name, parameter), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(held[parameter], value), name

    def never(parameters):
        raise AssertionError("gather must not be entered for a checkpoint that does not fit")

    change(folder, lambda t: t.update({"lm_head.weight": torch.zeros(60, 32)}))
    with pytest.raises(
        ValueError, match=r"lm_head.weight in model.safetensors of shape \[60, 32\] instead of \[61, 32\]"
    ):
        hf.load(folder, model, never)


BLOCK = "longreach.models.block.Block"
SOFTMAX = "longreach.models.mixers.softmax.softmax_attention.SoftmaxAttention"


def with_mixer(**changes):
    settings = settings_of(tiny_config())
    (name,) = settings["mixers"]
    settings["mixers"] = {name: {**settings["mixers"][name], **changes}}
    return settings


@pytest.mark.usefixtures("four_families")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            lambda: with_mixer(_target_="longreach.models.mixers.linear.retnet.RetNet"),
            r"mixers\.full\._target_='longreach.*RetNet'",
        ),
        (lambda: with_mixer(sink_logits=True), "sink_logits=True"),
        (lambda: with_mixer(rope_fraction=0.5), "rope_fraction=0.5"),
        (lambda: with_mixer(rope_base=None), "rope_base=None"),
        (lambda: with_mixer(qk_norm="full"), "qk_norm='full'"),
        (lambda: with_mixer(output_bias=True), "bias=False with .*output_bias=True, which must be equal"),
        (lambda: with_mixer(window=8, qk_norm="head", bias=True), "bias=True with .*output_bias=False"),
        (lambda: with_mixer(qk_norm="head", norm_eps=1e-3), "norm_eps=1e-05 with .*0.001"),
        (lambda: {**with_mixer(), "block": {"_target_": BLOCK, "norm_eps": 1e-3}}, "norm_eps=1e-05 with .*0.001"),
        (lambda: {**with_mixer(), "feed_forward": None}, "model.feed_forward=None"),
        (lambda: {**with_mixer(), "_target_": "collections.UserDict"}, "model._target_='collections.UserDict'"),
        (lambda: {**with_mixer(), "block": {"_target_": "longreach.models.block.MiniMaxBlock"}}, "MiniMaxBlock"),
    ],
)
def test_models_that_no_family_expresses_are_not_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf.write(iter(()), settings(), tmp_path / "out", max_positions=64)
    assert not list(tmp_path.iterdir())


def described(path):
    config = json.loads((path / "config.json").read_text())
    return config["model_type"], config["architectures"], config.get("sliding_window", "none")


@pytest.mark.usefixtures("four_families")
def test_the_family_is_the_one_asked_for_or_the_origins_or_the_one_that_others_yield_to(folder, tmp_path):
    """A Llama is a Mistral without a window too."""
    transformers = pytest.importorskip("transformers")
    model, settings = load(folder), hf.read_settings(folder)
    for number, (more, expected) in enumerate(
        [
            ({}, "llama"),
            ({"family": "mistral"}, "mistral"),
            ({"origin": {"model_type": "mistral"}}, "mistral"),
            ({"origin": {"model_type": "mistral"}, "family": "llama"}, "llama"),
            ({"origin": {"model_type": "qwen3"}}, "llama"),  # which has a norm that this one does not
            ({"origin": {"model_type": "mamba"}}, "llama"),
        ]
    ):
        out = write(model, settings, tmp_path / str(number), **more)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert theirs.config.model_type == expected
        torch.testing.assert_close(their_logits(theirs, tokens()), logits(model, tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("four_families")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"window": 8}, ("mistral", ["MistralForCausalLM"], 8)),
        ({"heads": 6, "kv_heads": 2, "head_dim": 8}, ("mistral", ["MistralForCausalLM"], None)),
        ({"bias": True}, ("qwen2", ["Qwen2ForCausalLM"], None)),
        ({"bias": True, "window": 8}, ("qwen2", ["Qwen2ForCausalLM"], 8)),
        ({"bias": True, "output_bias": True}, ("llama", ["LlamaForCausalLM"], "none")),
        ({"qk_norm": "head", "window": 8}, ("qwen3", ["Qwen3ForCausalLM"], 8)),
    ],
)
def test_a_model_that_one_family_expresses_is_written_as_one(changes, expected, tmp_path):
    settings = with_mixer(**changes)
    assert described(write(instantiate(settings, _convert_="all"), settings, tmp_path / "out")) == expected


@pytest.mark.usefixtures("four_families")
@pytest.mark.parametrize(
    ("changes", "family", "message"),
    [
        (
            {"window": 8},
            "llama",
            r"got llama, .* by model\.mixers\.full\.window=8\. Choose mistral, or leave family out",
        ),
        (
            {"heads": 6, "kv_heads": 2, "head_dim": 8},
            "llama",
            r"heads=6, which must divide hidden_size\. Choose mistral",
        ),
        ({}, "qwen2", r"got qwen2, .*full\.bias=False\. Choose llama or mistral, or"),
        ({"norm_eps": 1e-3}, "qwen3", r"got qwen3, which does not by .*qk_norm=None\. Choose"),
        ({}, "gpt2", "family must be one of llama, mistral, qwen2, qwen3; got 'gpt2'. Name one"),
        ({"sink_logits": True}, "llama", "got one that none does: not llama, mistral by .*sink_logits=True$"),
    ],
)
def test_a_family_that_does_not_express_the_model_is_refused_before_anything_is_written(
    changes, family, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        hf.write(iter(()), with_mixer(**changes), tmp_path / "out", max_positions=64, family=family)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("four_families")
def test_a_window_in_some_layers_is_no_mistral(tmp_path):
    settings = with_mixer()
    (mixer,) = settings["mixers"].values()
    settings |= {"pattern": ["a", "b"], "mixers": {"a": mixer, "b": {**mixer, "window": 8}}}
    with pytest.raises(ValueError, match="mistral by a window in some layers, which must be in all or none"):
        hf.write(iter(()), settings, tmp_path / "out", max_positions=64)


@pytest.mark.usefixtures("four_families")
def test_where_two_families_express_a_model_alike_one_must_be_named(monkeypatch, tmp_path):
    known = hf.known_families()
    twin = replace(known["llama"], model_type="twin")
    monkeypatch.setattr(hf, "known_families", lambda: {**known, "twin": twin})
    with pytest.raises(ValueError, match="family must be given where several express the model; got none"):
        hf.write(iter(()), with_mixer(), tmp_path / "out", max_positions=64)
    settings = with_mixer()
    out = write(instantiate(settings, _convert_="all"), settings, tmp_path / "out", family="twin")
    assert described(out)[0] == "twin"


def test_every_family_has_a_file_and_a_type_of_its_own_and_yields_to_known_ones():
    known = hf.known_families()
    files = {file.stem for file in Path(families.__file__).parent.glob("*/*.py")} - {"__init__"}
    assert files == set(known)
    assert all(set(family.yields_to) < set(known) - {name} for name, family in known.items())


@pytest.mark.usefixtures("four_families")
def test_a_hybrid_of_two_rotary_bases_is_not_written(tmp_path):
    settings = with_mixer(qk_norm="head")
    (mixer,) = settings["mixers"].values()
    settings |= {"pattern": ["a", "b"], "mixers": {"a": mixer, "b": {**mixer, "rope_base": 1e6}}}
    with pytest.raises(ValueError, match=r"a\.rope_base=10000.0 with .*b\.rope_base=1000000.0, which must be equal"):
        hf.write(iter(()), settings, tmp_path / "out", max_positions=64)


@pytest.mark.parametrize(
    "scaling", [None] + [{"kind": kind, "factor": 4.0, "original_length": ORIGINAL} for kind in ("llama3", "yarn")]
)
def test_settings_by_their_defaults_are_written_in_full(scaling, tmp_path):
    """A preset that leaves out what is neutral, as in conf/model, is the same model."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "_target_": "longreach.models.language_model.LanguageModel",
        "vocabulary": 61,
        "width": 32,
        "depth": 4,
        "pattern": ["attention*2"],
        "mixers": {"attention": {"_target_": SOFTMAX, "_partial_": True, "heads": 4, "rope_scaling": scaling}},
        "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 40},
    }
    model = instantiate(settings, _convert_="all")
    model.initialise(seed=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write(model, settings, tmp_path / "out"))
    torch.testing.assert_close(their_logits(theirs, tokens()), logits(model, tokens()), atol=1e-4, rtol=1e-4)


def test_an_interrupted_or_wrong_write_leaves_nothing(tmp_path, folder):
    settings = hf.read_settings(folder)
    state = list(load(folder).named_parameters())
    for wrong, message in ((state[:-1], "missing: head.weight"), ([*state, ("more", state[0][1])], "got more")):
        with pytest.raises(ValueError, match=message):
            hf.write(iter(wrong), settings, tmp_path / "out", max_positions=64)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
    with pytest.raises(ValueError, match="path must be a new or empty folder"):
        hf.write(iter(state), settings, folder, max_positions=64)
    with pytest.raises(ValueError, match="config must not hold what the settings say; got vocab_size"):
        hf.write(iter(state), settings, tmp_path / "out", max_positions=64, config={"vocab_size": 3})


@pytest.mark.slow
def test_transformers_is_not_needed():
    code = "import sys, longreach.models.hf as hf; hf.known_families(); sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
