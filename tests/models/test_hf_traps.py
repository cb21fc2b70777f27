"""Where checkpoints and their config.json are read wrongly with ease."""

import json
from typing import Any

import pytest
import torch
from checkpoint_cases import CASES
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
from definitions import definitions_of
from hydra.utils import instantiate
from model_presets import build_model, compose_model
from omegaconf import OmegaConf
from safetensors.torch import load_file

from longreach.kernels.documents import Documents
from longreach.models import hf
from longreach.parallel.sequence import Sequence


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


# Keys that config.json leaves out.


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in hf.known_families() if name in CASES])
@pytest.mark.usefixtures("_own_classes")
def test_what_config_json_leaves_out_is_what_transformers_takes(family):
    """Each key alone: defaults of sizes and layers, windows and bases. What is refused says the key."""
    from transformers import CONFIG_MAPPING

    table, whole = hf.known_families()[family], config_of(family, CASES[family]).to_dict()
    settings = table.settings(whole)
    compared = 0
    for key in whole.keys() - {"model_type"}:
        left = {name: value for name, value in whole.items() if name != key}
        try:
            expected = table.settings(CONFIG_MAPPING[family].from_dict(left).to_dict())
        except Exception:  # their class refuses it, or fills in what does not fit the rest
            continue
        try:
            read = table.settings(left)
        except ValueError as error:
            read = expected if key in str(error) else error
        assert read == expected, key
        compared += expected != settings
    assert compared > 2


def test_the_layers_that_config_json_names_count_more_than_those_that_transformers_would_guess():
    """MiniMax's class alternates where the published model has 7 to 1; Gemma 3's has windows of 4096."""
    minimax = {"model_type": "minimax", "num_hidden_layers": 8, "head_dim": 8}
    assert settings_of(**minimax)["pattern"] == ["full", "linear"] * 4
    assert settings_of(**minimax, attn_type_list=[0] * 7 + [1])["pattern"] == ["linear*7", "full"]
    named = settings_of(**minimax, layer_types=["linear_attention"] * 7 + ["full_attention"])
    assert named["pattern"] == ["linear*7", "full"]
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 6}
    assert settings_of(**gemma)["mixers"]["window"]["window"] == 4096
    assert settings_of(**gemma, sliding_window=512)["mixers"]["window"]["window"] == 512
    with pytest.raises(ValueError, match="layer_types must name one of"):
        settings_of(model_type="kimi_linear", num_key_value_heads=4)


# Rotary positions.


def whole_rows(x):
    return Sequence.single(Documents.whole(*x.shape[:2]))


def rotation_there(family, config):
    """The matrix by which transformers' class of the family turns a row of the token at position 1."""
    modeling = definitions_of(family.removesuffix("_text"))
    names = {"llama4_text": "Llama4Text", "deepseek_v3": "DeepseekV3"}
    rotary = getattr(modeling, f"{names.get(family, family.capitalize())}RotaryEmbedding")(config)
    size = 2 * len(rotary.inv_freq)
    rows = torch.eye(size).expand(1, 2, -1, -1)  # as many heads as dims
    angles = rotary(rows, torch.arange(2)[None])
    if family == "llama4_text":
        return modeling.apply_rotary_emb(rows, rows, angles)[0][0, 1]
    if family == "deepseek_v3":  # whose function leaves pairs half apart
        turned = modeling.apply_rotary_pos_emb_interleave(rows, rows, *angles, unsqueeze_dim=2)[0][0, 1]
        return turned.unflatten(-1, (2, -1)).mT.flatten(1)
    return modeling.apply_rotary_pos_emb(rows, rows, *angles, unsqueeze_dim=2)[0][0, 1]


@pytest.mark.parametrize(
    ("family", "neighbours"), [("llama", False), ("cohere2", True), ("deepseek_v3", True), ("llama4_text", True)]
)
@pytest.mark.usefixtures("_own_classes")
def test_pairs_that_turn_together_there_turn_together_here(family, neighbours):
    """Pairs are neighbours in some families, and stand half of the dims apart in others; here, always the latter."""
    config = config_of(family, CASES[family])
    settings = hf.known_families()[family].settings(json.loads(config.to_json_string()))
    parts = dict(instantiate(settings, _convert_="all").leaves())
    path, mixer = next((path, part) for path, part in parts.items() if getattr(part, "rotary", None) is not None)
    size = mixer.query.out_features // mixer.heads
    recipe = hf.known_families()[family].tensors(settings).read[f"{path}.query.weight"]
    order = recipe.whole(torch.arange(float(mixer.query.out_features))[:, None])[:size, 0].long()  # of the first head
    there, turned = torch.eye(size), rotation_there(family, config)
    there[-len(turned) :, -len(turned) :] = turned
    rows = torch.eye(size).expand(1, 2, -1, -1)
    here = (mixer.rotate if family == "deepseek_v3" else mixer.rotary)(rows, whole_rows(rows))[0, 1]
    torch.testing.assert_close(here, there[order][:, order])
    if neighbours:
        assert (here - there).abs().max() > 0.1


@pytest.mark.usefixtures("_own_classes")
def test_transformers_is_no_oracle_of_the_part_of_a_head_that_turns_in_minimax(tmp_path):
    """The published config.json has `rotary_dim`, half of a head, which the class passes by."""
    more = {"num_local_experts": 2, "head_dim": 8, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    whole, half = (random_model(config_of("minimax", {**more, "rotary_dim": dims})) for dims in (8, 4))
    assert torch.equal(their_logits(whole, tokens()), their_logits(half, tokens()))
    ours = load(saved(whole, tmp_path / "whole"))
    torch.testing.assert_close(logits(ours, tokens()), their_logits(whole, tokens()), atol=1e-4, rtol=1e-4)
    mixer = load(saved(half, tmp_path / "half")).mixers[0]
    x = torch.randn(1, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(9)[:, None] * mixer.rotary.rotation.base ** (-torch.arange(2) / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x.split([2, 2, 4], dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    torch.testing.assert_close(mixer.rotary(x, whole_rows(x[..., 0])), expected)


# Latent attention.


def latent_attention(x, held, config):
    """As DeepSeek-V2's paper has it, of a checkpoint's tensors: keys by W^UK, values by W^UV, both of the latent."""

    def project(name, x):
        return x @ held[f"{name}.weight"].double().T

    def norm(name, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * held[f"{name}.weight"].double()

    def turned(x):  # neighbours are a pair
        if config.model_type == "kimi_linear":
            return x
        pairs, position = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), torch.arange(x.shape[1])
        steps = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs.shape[-1]) / pairs.shape[-1])
        angles = position[:, None].double() * steps.double()
        angles = angles if x.dim() == 3 else angles[:, None]
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    nope, rope, values = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    q = norm("q_a_layernorm", project("q_a_proj", x)) if config.q_lora_rank else x
    q = project("q_b_proj" if config.q_lora_rank else "q_proj", q).unflatten(-1, (-1, nope + rope))
    q_nope, q_rope = q.split([nope, rope], dim=-1)
    latent, shared = project("kv_a_proj_with_mqa", x).split([config.kv_lora_rank, rope], dim=-1)
    expanded = project("kv_b_proj", norm("kv_a_layernorm", latent)).unflatten(-1, (-1, nope + values))
    keys, v = expanded.split([nope, values], dim=-1)
    logits = torch.einsum("bthk,bshk->bhts", q_nope, keys) + torch.einsum(
        "bthk,bsk->bhts", turned(q_rope), turned(shared)
    )
    logits = logits * (nope + rope) ** -0.5  # without positions too
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    out = torch.einsum("bhts,bshv->bthv", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return project("o_proj", out.flatten(-2))


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
@pytest.mark.usefixtures("_own_classes")
def test_latent_attention_is_that_of_the_paper_with_the_tensors_of_a_checkpoint(family, tmp_path):
    theirs = random_model(config_of(family, CASES[family]))
    folder = saved(theirs, tmp_path)
    mixer = load(folder, torch.float64).mixers[1]
    prefix = "model.layers.1.self_attn."
    held: dict[str, Any] = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }
    x = torch.randn(2, 19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x, whole_rows(x)), latent_attention(x, held, theirs.config), atol=1e-9, rtol=1e-9)


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
