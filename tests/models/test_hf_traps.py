"""Where checkpoints and their config.json are read wrongly with ease."""

import pytest
import torch
from checkpoints import (
    SMALL,
    InFloat64,
    config_of,
    load,
    logits,
    own_classes,
    random_model,
    saved,
    their_logits,
    tokens,
    write,
)
from model_presets import build_model, compose_model
from omegaconf import OmegaConf

from longreach.models import hf


@pytest.fixture
def _own_classes():
    pytest.importorskip("transformers")
    with own_classes():
        yield


def settings_of(**config):
    return hf.known_families()[config["model_type"]].settings({**SMALL, **config})


FALCON_H1 = {"model_type": "falcon_h1", "mamba_n_heads": 4, "mamba_d_ssm": None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FALCON_H1 | {"mamba_d_ssm": 30, "mamba_d_head": 8}, r"mamba_d_ssm must be .* \* mamba_d_head = 32; got 30"),
        (FALCON_H1 | {"projectors_bias": True}, "projectors_bias must be mamba_proj_bias = False; got True"),
        (FALCON_H1 | {"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers must list 5 positive numbers; got"),
        (FALCON_H1 | {"mlp_multipliers": [1.0, 0]}, "mlp_multipliers must be a positive number; got 0"),
        (FALCON_H1 | {"hidden_size": "a"}, "hidden_size must be a positive integer; got 'a'"),
        (
            {"model_type": "recurrent_gemma", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type must be default; got 'linear'",
        ),
        ({"model_type": "recurrent_gemma", "block_types": ["mamba"]}, "block_types must list recurrent and attention"),
        ({"model_type": "recurrent_gemma", "hidden_activation": "silu"}, "hidden_activation must be 'gelu_pytorch_tan"),
        ({"model_type": "xlstm", "num_heads": 3}, r"num_heads must divide qk_dim_factor \* hidden_size = 16; got 3"),
        ({"model_type": "xlstm", "num_blocks": 5}, "num_blocks must be num_hidden_layers = 3; got 5"),
        ({"model_type": "xlstm", "weight_mode": "fused"}, "weight_mode must be 'single'; got 'fused'"),
        (
            {"model_type": "xlstm", "use_bias": True, "tie_word_embeddings": True},
            "tie_word.* False; got.*use_bias must",
        ),
        ({"model_type": "rwkv", "attention_hidden_size": 48}, "attention_hidden_size must be hidden_size = 32; got 48"),
        ({"model_type": "rwkv", "layer_norm_epsilon": 1e-3}, "layer_norm_epsilon must be 1e-05; got 0.001"),
    ],
)
def test_unsupported_recurrent_models_are_refused_by_the_name_of_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        settings_of(**config)


def test_only_models_with_both_mixers_side_by_side_everywhere_are_written_as_falcon_h1():
    family = hf.known_families()["falcon_h1"]
    settings = settings_of(**FALCON_H1)
    assert settings["pattern"] == ["linear+full"]
    assert not family.config(settings | {"pattern": ["full+linear"]}).problems
    for pattern in (["linear+full", "linear", "full"], ["linear", "full", "full"]):
        problems = family.config(settings | {"pattern": pattern, "side_by_side": None}).problems
        assert any("which must all have linear+full" in problem for problem in problems)
    norms = family.config(settings | {"side_by_side": settings["side_by_side"] | {"norms": True}}).problems
    assert norms == ["model.side_by_side.norms=True"]


def test_a_pattern_that_config_repeats_is_written_by_its_shortest_period():
    family = hf.known_families()["recurrent_gemma"]
    for depth in (3, 7, 26):
        settings = settings_of(model_type="recurrent_gemma", num_hidden_layers=depth)
        written = family.config(settings)
        assert not written.problems
        assert written.config["block_types"] == ["recurrent", "recurrent", "attention"]
    settings = settings_of(model_type="recurrent_gemma", block_types=["recurrent", "attention", "attention"])
    assert family.settings(family.config(settings).config) == settings


def test_the_normaliser_of_recurrent_gemma_is_rounded_as_in_bfloat16():
    assert settings_of(model_type="recurrent_gemma", hidden_size=2560)["embedding_multiplier"] == 50.5
    settings = settings_of(model_type="recurrent_gemma") | {"embedding_multiplier": 32**0.5}
    problems = hf.known_families()["recurrent_gemma"].config(settings).problems
    assert problems == [
        f"model.embedding_multiplier={32**0.5!r}, which must be 5.65625, the square root of hidden_size"
    ]


def test_logits_without_a_cap_are_not_written_as_a_model_that_caps_them():
    settings = settings_of(model_type="recurrent_gemma") | {"logit_softcap": None}
    assert hf.known_families()["recurrent_gemma"].config(settings).problems == ["model.logit_softcap=None"]


def test_sizes_that_xlstm_gives_as_parts_of_the_width_come_back():
    """Products of the width and a part of it are rounded down: 0.35 * 20 is 7, and so is 0.36 * 20."""
    family = hf.known_families()["xlstm"]
    for size in range(1, 40):
        settings = settings_of(model_type="xlstm", hidden_size=37, num_heads=1)
        settings["mixers"]["linear"] |= {"key_dim": size, "value_dim": 2 * size}
        settings["feed_forward"]["hidden"] = 3 * size
        assert family.settings(family.config(settings).config) == settings
    assert settings_of(model_type="xlstm", hidden_size=4096)["feed_forward"]["hidden"] == 10944
    assert settings_of(model_type="xlstm", hidden_size=None, embedding_dim=64)["width"] == 64


@pytest.mark.usefixtures("_own_classes")
def test_rwkv_is_the_model_that_was_trained_not_the_one_whose_weights_are_rescaled(tmp_path):
    theirs = random_model(config_of("rwkv", {"rescale_every": 1}))
    ours = load(saved(theirs, tmp_path / "theirs"), torch.float64)
    theirs.double()
    with InFloat64():
        in_evaluation, in_training = their_logits(theirs, tokens()), their_logits(theirs.train(), tokens())
    torch.testing.assert_close(logits(ours, tokens()), in_training, atol=1e-9, rtol=1e-9)
    assert (in_evaluation - in_training).abs().max() > 1e-7  # the eps of norms is not divided


@pytest.mark.usefixtures("_own_classes")
def test_rwkv_whose_mixes_are_those_of_the_token_before_is_written_too(tmp_path):
    from transformers import AutoModelForCausalLM

    changes = {"width": 32, "depth": 2, "feed_forward": {"hidden": 40}, "vocabulary": 61}
    settings = OmegaConf.to_container(OmegaConf.merge(compose_model("rwkv4_tiny"), changes))
    ours = build_model("rwkv4_tiny", **changes)
    ours.initialise(seed=0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    folder = write(ours, settings, tmp_path)
    expected = logits(ours, tokens())
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(load(folder), tokens()), expected, atol=1e-5, rtol=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(their_logits(theirs, tokens()), expected, atol=1e-4, rtol=1e-4)


def test_rwkv_starts_alike_whosever_part_its_mixes_are():
    changes = {"width": 32, "depth": 3, "feed_forward": {"hidden": 40, "own_mix": True}}
    own = build_model("rwkv4_tiny", mixers={"rwkv": {"own_mix": True}}, **changes)
    changes["feed_forward"]["own_mix"] = False
    before = build_model("rwkv4_tiny", **changes)
    for model in (own, before):
        model.initialise(seed=0)
    for (name, a), b in zip(own.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, 1 - b if name.endswith(".mix") else b, msg=name)


def test_a_hybrid_without_its_recurrent_layers_is_read_again():
    """What its config.json then says of heads divides the width, which transformers' class wants of layers it lacks."""
    settings = settings_of(model_type="bamba", attn_layer_indices=[0, 1, 2])
    written = hf.known_families()["bamba"].config(settings)
    assert not written.problems
    assert (2 * SMALL["hidden_size"]) % written.config["mamba_n_heads"] == 0
    assert hf.known_families()["bamba"].settings(written.config) == settings


@pytest.mark.parametrize("model_type", ["kimi_linear", "nemotron_h"])
def test_embeddings_that_transformers_never_ties_are_not_tied(model_type):
    layers = {"layer_types": ["full_attention"] * 3, "layers_block_type": ["full_attention"] * 3}
    settings = settings_of(model_type=model_type, tie_word_embeddings=True, num_key_value_heads=4, **layers)
    assert not settings["tied_embeddings"]
    family = hf.known_families()[model_type]
    assert family.config(settings).config["tie_word_embeddings"] is False
    assert any("tied_embeddings" in each for each in family.config(settings | {"tied_embeddings": True}).problems)


def test_yarn_is_refused_of_llama_4_whose_norms_undo_part_of_it():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rope_type must be one of default, linear.*; got 'yarn'"):
        settings_of(model_type="llama4_text", rope_parameters=yarn)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_the_scaling_of_phi3_is_read_by_its_older_names_and_written_as_its_first_versions_take_it(kind):
    family = hf.known_families()["phi3"]
    scaling = {"type": kind, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 5.0]}
    config = {**SMALL, "model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    # Without the key, the original length is that of transformers' class, whatever the scaling says.
    config["max_position_embeddings"] = 4 * 4096
    settings = family.settings(config | {"rope_scaling": scaling | {"original_max_position_embeddings": 99}})
    assert settings == family.settings(config) == family.settings(config | {"original_max_position_embeddings": 4096})
    assert settings["mixers"]["full"]["rope_scaling"] == {
        "kind": "longrope",
        "factor": 4.0,
        "original_length": 4096,
        "short_factors": scaling["short_factor"],
        "long_factors": scaling["long_factor"],
    }
    written = family.written({**family.config(settings).config, "max_position_embeddings": 4 * 4096})
    assert written["rope_scaling"] == scaling | {"type": "longrope"}
    assert written["original_max_position_embeddings"] == 4096
    assert hf.max_positions(settings, 64, family="phi3") == 4 * 4096
    with pytest.raises(ValueError, match=r"rope_scaling\.rope_type must be one of default, longrope; got 'linear'"):
        family.settings(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_scaling_in_older_keys_is_that_of_full_layers_alone_where_layer_types_have_their_own():
    """Version 5.23 takes another base for OLMo 3's windows then, which the published models do not have."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for name in ("olmo3", "gemma3_text"):
        family = hf.known_families()[name]
        config = {**SMALL, "model_type": name, "num_hidden_layers": 6, "rope_theta": 7e4, "rope_scaling": yarn}
        mixers = family.settings(config)["mixers"]
        assert (mixers["full"]["rope_base"], mixers["full"]["rope_scaling"]["kind"]) == (7e4, "yarn")
        assert (mixers["window"]["rope_base"], mixers["window"]["rope_scaling"]) == (
            7e4 if name == "olmo3" else 1e4,
            None,
        )
        with pytest.raises(ValueError, match=r"rope_parameters must be by layer type; got \['factor', 'rope_type'\]"):
            family.settings(config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
