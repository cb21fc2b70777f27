"""Families of flash-linear-attention against its classes, which run on its own plain functions here."""

from functools import partial
from pathlib import Path

import pytest
from checkpoint_checks import (
    check_greedy_decoding,
    check_logits,
    check_logits_in_float64_and_settings,
    check_loss_and_gradients,
    check_two_ranks,
    check_what_is_written,
)
from checkpoints import Imported, filled
from fla_models import ALSO, CASES, FULL, SMALL, WINDOW, config_of, greedy, model_of, plain_functions

from longreach.models import hf

FAMILIES = [name for name, family in hf.known_families().items() if family.library == "flash-linear-attention"]
# Those that run on ranks and decode: one of each family, with most of what it has.
RUN = (
    "gla_conv", "retnet", "delta_net", "gated_deltanet_sigmoid", "kda", "gsa_conv", "hgrn2", "hgrn", "rwkv7",
    "transformer", "forgetting_transformer",
)  # fmt: skip


def family_named(case):
    return max((name for name in FAMILIES if case.startswith(name)), key=len)


def cases(of=CASES):
    """The cases, as a parameter of the fixture `imported`; all are slow, since the library takes seconds to import."""
    parameters = [pytest.param(case, marks=pytest.mark.slow) for case in of]
    return pytest.mark.parametrize("imported", parameters, indirect=True)


@pytest.fixture(scope="module")
def imported(request, tmp_path_factory):
    family = request.param if request.param in ALSO else family_named(request.param)
    with plain_functions():
        reference = filled(model_of(config_of(family, {**CASES, **ALSO}[request.param])))
        yield Imported(request.param, family, reference, tmp_path_factory.mktemp("theirs"))


def test_every_family_has_a_case():
    assert set(FAMILIES) <= set(CASES)
    assert set(FAMILIES) == {family_named(case) for case in RUN}
    folder = Path(hf.__file__).parent / "families" / "flash_linear_attention"
    assert set(FAMILIES) == {path.stem for path in folder.glob("[a-z]*.py")}


@cases()
def test_logits_are_theirs_in_float64_and_settings_come_back(imported):
    check_logits_in_float64_and_settings(imported)


@cases()
def test_logits_are_theirs(imported):
    check_logits(imported)


@cases()
def test_loss_and_gradients_are_theirs_in_float64(imported, tmp_path):
    check_loss_and_gradients(imported, tmp_path)


@cases()
def test_what_is_written_is_what_was_read_and_they_load_it(imported, tmp_path):
    check_what_is_written(imported, type(imported.reference), tmp_path)


@cases(of=RUN)
def test_two_ranks_give_what_one_device_and_they_give(imported):
    check_two_ranks(imported)


@cases(of=RUN)
def test_greedy_decoding_is_theirs(imported):
    check_greedy_decoding(imported, partial(greedy, imported.reference), 64)


@cases(of=ALSO)
def test_models_of_a_type_that_transformers_has_too_are_read(imported, tmp_path):
    check_logits_in_float64_and_settings(imported)
    check_loss_and_gradients(imported, tmp_path)


# What needs no library.


def settings_of(model_type, **config):
    return hf.known_families()[model_type].settings({"model_type": model_type, **SMALL, **config})


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("gla", {"num_kv_heads": 1}, "num_kv_heads must be num_heads = 2; got 1"),
        ("gla", {"clamp_min": 0.0}, "clamp_min must be None; got 0.0"),
        ("gla", {"feature_map": "relu"}, "feature_map must be absent; got 'relu'"),
        ("gla", {"hidden_act": "powlu"}, "hidden_act must be 'swish' or 'silu'; got 'powlu'"),
        ("gla", {"expand_k": 0.3}, "expand_k must make hidden_size .* an integer; got 0.3"),
        ("gla", {"attnres_block_size": 2}, "attnres_block_size must be absent; got 2"),
        ("gla", {"attn": 3}, "attn must be null, .* got 3"),
        ("gla", {"attn": [FULL, FULL]}, "attn must be null, the settings .* or a list of two"),
        ("gla", {"attn": [FULL, WINDOW | {"layers": [1]}]}, r"attn must name each layer once; got \[1\] twice"),
        ("gla", {"attn": FULL | {"layers": [3]}}, r"attn.full.layers must list layers of 0 … 2; got \[3\]"),
        ("gla", {"attn": FULL | {"num_heads": 5}}, "attn.full.num_heads must divide hidden_size = 24; got 5"),
        ("delta_net", {"use_beta": False}, "use_beta must be True; got False"),
        ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2; got 3"),
        ("kda", {"safe_gate": True}, "lower_bound must be negative, or null without safe_gate; got None"),
        ("gsa", {"expand_v": 2.0}, "expand_v must be 1.0; got 2.0"),
        ("hgrn2", {"expand_ratio": 5}, "expand_ratio must divide hidden_size = 24; got 5"),
        ("rwkv7", {"value_dim": [24, 48, 24]}, "value_dim must be hidden_size = 24; got"),
        ("rwkv7", {"attn": FULL}, "attn must be absent"),
        (
            "mamba2",
            {"norm_eps": 1e-5, "rmsnorm": True, "norm_before_gate": True},
            "norm_before_gate must be False; got",
        ),
    ],
)
def test_what_a_config_may_not_say_is_named(model_type, config, message):
    with pytest.raises(ValueError, match=message):
        settings_of(model_type, **config)


def test_what_a_config_leaves_out_is_what_the_class_has():
    """Ratios, sizes per head and attention have been said so since the first versions."""
    gla = hf.known_families()["gla"].settings({"model_type": "gla", "hidden_ratio": 3})
    mixer = gla["mixers"]["linear"]
    assert (gla["width"], gla["depth"], gla["vocabulary"], gla["feed_forward"]["hidden"]) == (2048, 24, 32000, 4096)
    assert (mixer["heads"], mixer["key_dim"], mixer["value_dim"]) == (4, 256, 512)
    assert settings_of("gsa", exapnd_k=0.5)["mixers"]["linear"]["key_dim"] == 6
    hybrid = settings_of("gla", attn=[WINDOW, FULL])
    assert hybrid["pattern"] == ["window", "full", "linear"]
    assert (hybrid["mixers"]["window"]["window"], hybrid["mixers"]["window"]["bias"]) == (9, True)
    written = hf.known_families()["gla"]
    assert written.written(written.config(hybrid).config)["attn"][1]["num_kv_heads"] == 3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gla", {"gate_rank": 8}, "gla by model.mixers.linear.gate_rank=8"),
        ("retnet", {"norm": "group"}, "retnet by model.mixers.linear.norm='group'"),
        ("hgrn2", {"norm_eps": 1e-6}, "hgrn2 by model.mixers.linear.norm_eps=1e-06"),
        ("hgrn2", {"key_dim": 5}, "hgrn2 by model.mixers.linear.key_dim=5"),
        ("rwkv7", {"key_eps": 1e-4}, "rwkv7 by model.mixers.linear.key_eps=0.0001, which must be 1e-6 or 0"),
        ("kda", {"low_rank": False}, "kda by model.mixers.linear.low_rank=False"),
    ],
)
def test_what_a_family_does_not_express_is_not_written(family, changes, message, tmp_path):
    settings = settings_of(family, **({"expand_ratio": 12} if family == "hgrn2" else {}))
    mixer = settings["mixers"]["linear"] | changes
    with pytest.raises(ValueError, match=message):
        hf.write(iter(()), settings | {"mixers": {"linear": mixer}}, tmp_path / "out", max_positions=64, family=family)
