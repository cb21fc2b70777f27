"""Every family of Hugging Face checkpoints against transformers' class, in one small model or a few.

The families of `few_checkpoints` pass all tests in `make check`, and the others the one that takes least.
"""

import json

import pytest
import torch
from checkpoint_cases import CASES, family_named
from checkpoint_checks import (
    check_greedy_decoding,
    check_logits,
    check_logits_in_float64_and_settings,
    check_loss_and_gradients,
    check_two_ranks,
    check_what_is_written,
)
from checkpoint_table import BOUNDS, COLUMNS, COMMAND, PAGE, UNKNOWN, refused, rows_of
from checkpoints import (
    SMALL,
    Imported,
    config_of,
    few_checkpoints,
    load,
    logits,
    own_classes,
    random_model,
    tokens,
    write,
)
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from longreach.models import hf
from longreach.models.hf.checkpoint import Checkpoint
from longreach.models.part import Cut

FIRST = [case for case in CASES if case == family_named(case)]
FEW = few_checkpoints(FIRST)


def cases(fast):
    """Every case, as a parameter of the fixture `imported`; those that are not among `fast` are slow."""
    parameters = [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in CASES]
    return pytest.mark.parametrize("imported", parameters, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def _own_classes():
    pytest.importorskip("transformers")
    with own_classes():
        yield


@pytest.fixture(scope="module")
def imported(request, tmp_path_factory):
    family = family_named(request.param)
    return Imported(
        request.param, family, random_model(config_of(family, CASES[request.param])), tmp_path_factory.mktemp("theirs")
    )


@cases(fast=FIRST)
def test_logits_are_those_of_transformers_in_float64_and_settings_come_back(imported):
    check_logits_in_float64_and_settings(imported)


@cases(fast=FEW[:5])
def test_logits_are_those_of_transformers(imported):
    check_logits(imported)


@cases(fast=FEW[:5])
def test_loss_and_gradients_are_those_of_transformers_in_float64(imported, tmp_path):
    check_loss_and_gradients(imported, tmp_path)


@cases(fast=FEW[:5])
def test_what_is_written_is_what_was_read_and_transformers_loads_it(imported, tmp_path):
    from transformers import AutoModelForCausalLM

    check_what_is_written(imported, AutoModelForCausalLM, tmp_path)


@cases(fast=FEW[:2])
def test_two_ranks_give_what_one_device_and_transformers_give(imported):
    check_two_ranks(imported)


@cases(fast=["llama"])
def test_greedy_decoding_is_that_of_transformers(imported):
    # With a cache their Mamba-2 does not clamp its steps; a case says if its model has none.
    config = imported.reference.config
    cached = config.use_cache and getattr(config, "time_step_limit", (0.0,))[0] == 0.0

    def theirs(prompt, ours):
        row = imported.reference.generate(
            prompt, max_new_tokens=len(ours), do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=cached
        )
        return row[0, prompt.shape[1] :].tolist()

    check_greedy_decoding(imported, theirs, 64 if imported.case == imported.family else 12)


# What needs no transformers.


def settings_of(**config):
    return hf.known_families()[config["model_type"]].settings({**SMALL, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise must be 0.0 or 0; got 0.1"),
        ({"model_type": "mixtral", "router_aux_loss_coef": -1}, "router_aux_loss_coef must be .* not negative; got -1"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts must be a positive integer; got 0"),
        ({"model_type": "mixtral", "num_experts": 0.5}, "num_local_experts must be a positive integer; got 0.5"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers must be a list of layers; got 3"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be absent"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention must be abs"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method must be 'greedy' or 'group_limited_gr"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob must be False; got True"),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, "topk_method must be 'noaux_tc'; got 'greedy'"),
        (
            {"model_type": "deepseek_v3", "num_key_value_heads": 2},
            "num_key_value_heads must be num_attention_heads",
        ),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave must be True; got False"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": -1}, "first_k_dense_replace must be .* not negative"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config.dequantize=True"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "swiglu_alpha must be 1.702; got 1.0"),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 2, 1]}, "no_rope_layers must have a 0 or 1 for each of 3"),
        ({"model_type": "kimi_linear"}, "layer_types must name one of full_attention, linear_attention for each"),
        (
            {"model_type": "minimax", "mlp_alpha_factor": 2.0},
            "full_attn_alpha_factor, .* must be equal; got 1, 1.0, 2.0",
        ),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 0, 1]}, "layer_types must name one of full_attention for"),
        ({"model_type": "minimax", "sliding_window": 8}, "sliding_window must be absent; got 8"),
        ({"model_type": "mamba2", "num_heads": 5}, "num_heads must be expand .* / head_dim = 1; got 5"),
        ({"model_type": "mamba2", "time_step_limit": [0.1]}, "time_step_limit must be two numbers; got"),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["attention", "moe"], "mlp_bias": True},
            "mlp_bias must be absent; got True",
        ),
        ({"model_type": "cohere2", "layer_types": ["full_attention"]}, "layer_types must name one of .* each of 3 la"),
    ],
)
def test_unsupported_models_are_refused_by_the_name_of_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        settings_of(**config)


def mixtral(path):
    settings = settings_of(model_type="mixtral", num_local_experts=4)
    model = instantiate(settings, _convert_="all")
    model.initialise(seed=0)
    return model, settings, write(model, settings, path)


def test_ranks_that_share_experts_read_their_own_alone(tmp_path, monkeypatch):
    whole, settings, folder = mixtral(tmp_path / "model")
    ours, held, read = instantiate(settings, _convert_="all"), range(1, 3), []
    for name, parameter in list(ours.named_parameters()):
        if ".experts." in name:
            parameter.cut = Cut(parameter.shape, held)
            parameter.data = torch.zeros_like(parameter[: len(held)])
    known = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or known(self, name))
    hf.load(folder, ours)
    for (name, parameter), expected in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected[held.start : held.stop] if ".experts." in name else expected), name
    assert {name.split(".experts.")[1][0] for name in read if ".experts." in name} == {"1", "2"}


def test_a_bias_of_the_router_that_a_family_lacks_is_refused(tmp_path):
    model, settings, _ = mixtral(tmp_path / "model")
    model.blocks[1].feed_forward.router.bias[2] = 0.25
    with pytest.raises(ValueError, match=r"blocks.1.feed_forward.router.bias must be 0, .*bias_rate=0"):
        write(model, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ["full|experts|experts"], "mixers": ..., "feed_forward": None}, r"model.pattern=\['full\|exp"),
        ({"feed_forward": {"renormalise": False}}, "mixtral by model.feed_forward.renormalise=False"),
        ({"feed_forward": {"shared_hidden": 8}}, "mixtral by model.feed_forward.shared_hidden=8"),
        ({"feed_forward": {"groups": 2}}, "mixtral by model.feed_forward.groups=2"),
    ],
)
def test_models_of_experts_that_a_family_does_not_express_are_not_written(changes, message, tmp_path):
    settings = settings_of(model_type="mixtral")
    feed_forward = settings["feed_forward"] | (changes.get("feed_forward") or {})
    if "mixers" in changes:
        settings |= {**changes, "mixers": settings["mixers"] | {"experts": feed_forward}}
    else:
        settings |= {"feed_forward": feed_forward}
    with pytest.raises(ValueError, match=message):
        hf.write(iter(()), settings, tmp_path / "out", max_positions=64, family="mixtral")


def test_experts_in_the_pattern_are_those_in_the_feed_forward_layer(tmp_path):
    settings = settings_of(model_type="mixtral")
    named = {"pattern": ["full|moe"], "feed_forward": None}
    again = settings | named | {"mixers": settings["mixers"] | {"moe": settings["feed_forward"]}}
    model = instantiate(again, _convert_="all")
    model.initialise(seed=0)
    folder = write(model, again, tmp_path / "out", origin={"model_type": "mixtral"})
    assert hf.read_settings(folder) == settings
    assert torch.equal(logits(load(folder), tokens()), logits(model, tokens()))


def test_a_pattern_of_layers_must_be_given_where_transformers_guesses_another():
    """Its default for Kimi Linear has full attention in other layers than the published model, counted from 0."""
    published = {"full_attn_layers": [2, 3], "kda_layers": [1], "head_dim": 8, "num_heads": 3}
    settings = settings_of(model_type="kimi_linear", num_key_value_heads=4, linear_attn_config=published)
    assert settings["pattern"] == ["linear|dense", "mla|experts*2"]
    assert settings["mixers"]["linear"]["head_dim"] == 8


def test_the_part_of_a_head_that_turns_is_read_though_transformers_turns_all_of_it():
    """MiniMax-Text-01 says so by a key that transformers' class passes by: trap of the published checkpoints."""
    config = {"model_type": "minimax", "head_dim": 8, "layer_types": ["full_attention"] * 3}
    assert settings_of(**config)["mixers"]["full"]["rope_fraction"] == 1.0
    settings = settings_of(**config, rotary_dim=4)
    assert settings["mixers"]["full"]["rope_fraction"] == 0.5
    written = hf.known_families()["minimax"].config(settings)
    assert (written.problems, written.config["rotary_dim"]) == ([], 4)


def test_layers_that_predict_further_tokens_are_not_read(tmp_path):
    settings = settings_of(
        model_type="deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=2,
        moe_intermediate_size=8, n_shared_experts=1, num_key_value_heads=4, num_nextn_predict_layers=1,
    )  # fmt: skip
    model = instantiate(settings, _convert_="all")
    model.initialise(seed=0)
    folder = write(model, settings, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.layers.3.eh_proj.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert torch.equal(logits(load(folder), tokens()), logits(model, tokens()))


def test_the_page_has_a_row_of_today_for_each_family():
    rows, known = rows_of(PAGE.read_text()), hf.known_families()
    assert not rows.keys() - known.keys(), f"run {COMMAND}"
    cells = {name: dict(zip(COLUMNS, rows.get(name, ()), strict=False)) for name in known}
    stale = [
        name
        for name, family in known.items()
        if len(cells[name]) < len(COLUMNS)
        or (cells[name]["class"], cells[name]["refused"]) != (f"`{family.architecture}`", refused(family))
    ]
    assert not stale, f"run {COMMAND} {' '.join(stale)}"
    for name, row in cells.items():
        assert row["models"] != UNKNOWN, f"{PAGE} must say whose checkpoints have the form of {name}"
        errors = {column: float(row[column]) for column in BOUNDS if row[column] != UNKNOWN}
        assert "logits in float64" in errors, f"run {COMMAND} {name}"
        assert all(error <= BOUNDS[column] for column, error in errors.items()), name
