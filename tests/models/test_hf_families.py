"""Every family of Hugging Face checkpoints against transformers' class, in one small model or a few."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LENGTH,
    SMALL,
    InFloat64,
    config_of,
    family_of,
    in_float64,
    load,
    logits,
    own_classes,
    random_model,
    saved,
    their_logits,
    tokens,
    write,
)
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from longreach.kernels.documents import Documents
from longreach.models import hf
from longreach.models.decoding import generate
from longreach.models.hf.checkpoint import Checkpoint
from longreach.models.part import Cut
from longreach.parallel.sequence import Sequence

MIXTURE = {"num_local_experts": 6, "num_experts_per_tok": 3}
QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 10}
GEMMA3 = {"hidden_size": 36, "head_dim": 10, "sliding_window": 9}
COHERE2 = {"layer_norm_eps": 1e-3, "sliding_window": 9, "num_key_value_heads": 1, "logit_scale": 0.5}
DEEPSEEK_V3 = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
KIMI_LINEAR = DEEPSEEK_V3 | {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_local_experts": 8, "linear_head_dim": 8,
    "linear_num_heads": 3, "linear_conv_kernel_dim": 3, "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
KIMI_LINEAR.pop("n_routed_experts")
MINIMAX = MIXTURE | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 16, "head_dim": 6,
    "full_attn_alpha_factor": 1.7, "linear_attn_alpha_factor": 1.7, "mlp_alpha_factor": 1.7,
    "full_attn_beta_factor": 0.6, "linear_attn_beta_factor": 0.6, "mlp_beta_factor": 0.6,
}  # fmt: skip
MAMBA = {"state_size": 6, "conv_kernel": 3, "layer_norm_epsilon": 1e-3, "pad_token_id": 0}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16, "time_step_limit": [0.01, 2.0]}
JAMBA = {
    "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6,
    "mamba_d_conv": 3, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
BAMBA = {
    "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 3,
    "mamba_chunk_size": 16,
}  # fmt: skip
QWEN3_NEXT = QWEN3_MOE | {
    "shared_expert_intermediate_size": 20, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3, "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
LFM2 = {"norm_eps": 1e-3, "block_multiple_of": 4, "full_attn_idxs": [1]}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "ssm_state_size": 6, "head_dim": 10,
    "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 3, "chunk_size": 16,
    "layer_norm_epsilon": 1e-3,
}  # fmt: skip
GRANITE = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_chunk_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 6,
    "num_experts_per_tok": 3, "shared_intermediate_size": 20, "embedding_multiplier": 3.0, "logits_scaling": 0.7,
    "residual_multiplier": 0.3, "attention_multiplier": 0.2,
}  # fmt: skip
OLMO_HYBRID = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": None, "eos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": None},
}  # fmt: skip
CASES = {
    "mixtral": MIXTURE,
    "mixtral_window": MIXTURE | {"sliding_window": 7, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_dense_layers": QWEN3_MOE
    | {"norm_topk_prob": True, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9},
    "gemma3_text": GEMMA3 | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text_scaled": GEMMA3
    | {
        "head_dim": 6,
        "query_pre_attn_scalar": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3_yarn": DEEPSEEK_V3
    | {
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "kimi_linear": KIMI_LINEAR,
    "minimax": MINIMAX,
    "mamba": MAMBA,
    "mamba_biases": MAMBA
    | {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5, "tie_word_embeddings": False},
    "mamba2": MAMBA2,
    "mamba2_biases": MAMBA2 | {"use_bias": True, "use_conv_bias": False, "time_step_limit": [0.0, float("inf")]},
    "falcon_mamba": MAMBA | {"mixer_rms_eps": 1e-3},
    "jamba": JAMBA,
    "jamba_dense": JAMBA | {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5},
    "bamba": BAMBA,
    "bamba_biases": BAMBA | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_d_head": 8},
    "qwen3_next": QWEN3_NEXT,
    "qwen3_next_biases": QWEN3_NEXT | {"attention_bias": True, "mlp_only_layers": [0], "norm_topk_prob": False},
    "lfm2": LFM2,
    "lfm2_biases": LFM2 | {"conv_bias": True, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_biases": NEMOTRON_H | {"mlp_bias": True, "use_bias": True, "use_conv_bias": False},
    "granitemoehybrid": GRANITE,
    "granitemoehybrid_dense": GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope"},
    "olmo_hybrid": OLMO_HYBRID,
    "olmo_hybrid_biases": OLMO_HYBRID
    | {"attention_bias": True, "linear_allow_neg_eigval": False, "rope_parameters": {"rope_theta": 7e4}},
    "cohere2": COHERE2 | {"head_dim": 10},
    "cohere2_bias": COHERE2 | {"attention_bias": True, "tie_word_embeddings": False, "sliding_window_pattern": 2},
}
for name in hf.known_families():
    CASES.setdefault(name, {})  # a new family is tried without a line here


def family_named(case):
    return max((name for name in hf.known_families() if case.startswith(name)), key=len)


@cache
def _made(case):
    return random_model(config_of(family_named(case), CASES[case]))


@pytest.fixture(scope="module", autouse=True)
def _own_classes():
    pytest.importorskip("transformers")
    with own_classes():
        yield


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=() if case in hf.known_families() else pytest.mark.slow) for case in CASES],
)
def reference(request):
    """A small transformers model; tests copy it before they change it."""
    return _made(request.param)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    return saved(reference, tmp_path_factory.mktemp("theirs"))


def test_logits_are_those_of_transformers(reference, folder):
    expected = their_logits(reference, tokens())
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(load(folder), tokens()), expected, atol=1e-4, rtol=1e-4)


def test_loss_and_gradients_are_those_of_transformers_in_float64(reference, folder, tmp_path):
    """Their gradients are saved in place of their weights, so that ours are compared with what is read of them."""
    ours, theirs, row = load(folder, torch.float64), in_float64(copy.deepcopy(reference)), tokens(LENGTH // 2 + 3)
    with InFloat64():
        out = theirs(row, use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
    targets = torch.cat([row[:, 1:], torch.full_like(row[:, :1], -100)], 1)
    seq = Sequence.single(Documents.whole(*row.shape))
    torch.testing.assert_close(logits(ours, row), out.logits, atol=1e-9, rtol=1e-9)
    total, count = ours(row, seq, targets)
    assert int(count) == targets.numel() - len(targets)
    torch.testing.assert_close(total, loss, atol=1e-9, rtol=1e-9)
    total.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients = dict(load(saved(theirs, tmp_path / "gradients"), torch.float64).named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        assert expected.abs().max() > 0, name


def test_what_is_written_is_what_was_read_and_transformers_loads_it(reference, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, settings = load(folder), hf.read_settings(folder)
    out = write(ours, settings, tmp_path / "ours", family=family_of(reference))
    family = hf.known_families()[reference.config.model_type]
    before, after = Checkpoint(folder, family.aliases), Checkpoint(out)
    unread = before.headers.keys() - after.headers.keys()
    assert all(any(re.search(pattern, name) for pattern in family.ignored) for name in unread), unread
    for name in after.headers:
        if "olmo" not in family.model_type or "conv1d" not in name:  # which they cut into parts of equal size
            assert torch.equal(after.read(name), before.read(name)), name
    assert hf.read_settings(out) == settings
    assert torch.equal(logits(load(out), tokens()), logits(ours, tokens()))
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not {key: value for key, value in report.items() if value and set(value) != unread}, report
    assert type(theirs) is type(reference)
    for (name, a), (_, b) in zip(theirs.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(their_logits(theirs, tokens()), their_logits(reference, tokens()), atol=1e-4, rtol=1e-4)


def test_greedy_decoding_is_that_of_transformers(reference, folder):
    prompt = tokens()[:1, :11]
    # With a cache their Mamba-2 does not clamp its steps.
    cached = getattr(reference.config, "time_step_limit", (0.0,))[0] == 0.0
    theirs = reference.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=cached
    )
    ours = generate(load(folder), prompt[0].tolist(), max_new_tokens=12, temperature=0.0)
    assert list(ours) == theirs[0, 11:].tolist()


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
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping must be absent"),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention must be abs"),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, "topk_method must be 'noaux_tc'; got 'greedy'"),
        (
            {"model_type": "deepseek_v3", "num_key_value_heads": 2},
            "num_key_value_heads must be num_attention_heads",
        ),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave must be True; got False"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": -1}, "first_k_dense_replace must be .* not negative"),
        ({"model_type": "kimi_linear"}, "layer_types must name one of full_attention, linear_attention for each"),
        (
            {"model_type": "minimax", "mlp_alpha_factor": 2.0},
            "full_attn_alpha_factor, .* must be equal; got 1, 1.0, 2.0",
        ),
        ({"model_type": "minimax", "sliding_window": 8}, "sliding_window must be absent; got 8"),
        ({"model_type": "mamba2", "num_heads": 5}, "num_heads must be expand .* / head_dim = 1; got 5"),
        ({"model_type": "mamba2", "time_step_limit": [0.1]}, "time_step_limit must be two numbers; got"),
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


def test_every_family_has_a_row_in_the_page_of_checkpoints():
    page = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))
    assert rows == {name: family.architecture for name, family in hf.known_families().items()}
