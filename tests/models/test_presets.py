"""Every size in conf/model builds, is as large as its name states, writes nothing twice, and learns when tiny."""

import re
from functools import cache

import pytest
import torch
from few_families import few_families
from model_presets import CONF, MODELS, build_model, compose_model, tokens
from omegaconf import OmegaConf
from published_sizes import published

from longreach.kernels.documents import Documents
from longreach.kernels.masks import BlockLocal
from longreach.launch.configuration import model_sizes
from longreach.models.block import (
    Block,
    MiniMaxBlock,
    OutputNormBlock,
    ParallelBlock,
    PostNormBlock,
    SandwichBlock,
    ScaledBlock,
)
from longreach.models.hf import known_families
from longreach.models.layers.normalisation import RMSNorm
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.part import Part
from longreach.parallel.sequence import Sequence

FAMILIES = ("llama", "minimax_01", "sliding_window")
SPARSE = ("nsa", "moba", "infllm_v2", "nsa_gated_deltanet", "moba_lightning")  # tiny and 1B
# In the comments of YAMLs: with neither, of what a token uses.
STATED = re.compile(r"([\d.]+) (m|b)illion(?: parameters)?( besides|(?: with(?: a vocabulary of)? ([\d,]*\d)))?\b")
UNITS = {"m": 1e6, "b": 1e9}
SMALL = [preset for preset in MODELS if preset.endswith("_tiny")]


def on_meta(preset, vocabulary=4096):
    with torch.device("meta"):
        return build_model(preset, vocabulary=vocabulary)


def test_every_family_comes_in_every_size():
    every = {f"{family}_{size}" for family in FAMILIES for size in ("tiny", "125m", "1b", "8b")} | {"quickstart"}
    every |= {f"{family}_{size}" for family in SPARSE for size in ("tiny", "1b")}
    every |= {f"{size.partition('/')[0]}_tiny" for size in model_sizes().values()}
    assert every <= set(MODELS)


def leaves(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@cache
def settings_of_base(family):
    return dict(leaves(OmegaConf.to_container(compose_model(f"{family}/_base"))))


@pytest.mark.slow
@pytest.mark.parametrize("size", model_sizes().values())
def test_a_size_states_in_ten_lines_only_what_differs_from_its_family(size):
    path = CONF / "model" / f"{size}.yaml"
    assert len(path.read_text().splitlines()) <= 10
    stated = OmegaConf.to_container(OmegaConf.load(path))
    assert stated.pop("defaults") == [f"/model/{path.parent.name}/_base@_here_"]
    base = settings_of_base(path.parent.name)
    assert not [name for name, value in leaves(stated) if base.get(name, "nothing") == value]


def test_settings_of_mixers_are_written_once():
    """Families compose mixers and feed-forward layers by the names of their files."""
    for path in (CONF / "model").rglob("*.yaml"):
        targets = [value for name, value in leaves(OmegaConf.to_container(OmegaConf.load(path))) if "_target_" in name]
        assert not [target for target in targets if ".mixers." in target or ".feed_forward." in target], path


@pytest.mark.slow
@pytest.mark.parametrize("preset", [preset for preset in MODELS if preset not in published()])
def test_has_the_size_that_its_name_and_its_comment_state(preset):
    model = on_meta(preset)
    vocabulary = {id(weight): weight.numel() for weight in (model.embedding.weight, model.head.weight)}
    besides, of_a_token = model.parameter_count() - sum(vocabulary.values()), sum(vocabulary.values()) // 4096
    if size := re.search(r"_([\d.]+)([mb])$", preset):
        stated = float(size[1]) * UNITS[size[2]]
        here = besides + of_a_token * (32_768 if stated < 4e9 else 131_072)
        assert here == pytest.approx(stated, rel=0.15)
    else:
        assert 1e6 < besides < 4e6
    if preset not in model_sizes():
        return
    lines = (CONF / "model" / f"{model_sizes()[preset]}.yaml").read_text().splitlines()
    counts = STATED.findall(" ".join(line for line in lines if line.startswith("#")))
    assert counts
    for number, unit, what, size in counts:
        idle = 0 if what else model.parameter_count() - model.parameter_count(active=True)
        here = besides - idle + of_a_token * int(size.replace(",", "") or 0)
        assert f"{here / UNITS[unit]:.{len(number.partition('.')[2])}f}" == number, here


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [
        each if each.removesuffix("_tiny") in few_families() else pytest.param(each, marks=pytest.mark.many)
        for each in SMALL
    ],
)
def test_thirty_steps_lower_the_loss(preset):
    """On two packed rows that come again, which is cheap: ten steps after ten the loss is lower."""
    torch.manual_seed(0)
    model = build_model(preset)
    model.initialise(0)
    documents = Documents.from_lengths([[20, 12], [32]], 32)
    inputs = tokens(2, 32)
    targets = inputs.roll(-1, dims=1)
    targets[:, -1] = targets[0, 19] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
    losses = []
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 30)  # at one rate the last steps go up and down
        loss, count = model(inputs, Sequence.single(documents), targets)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((loss / count).item())
    assert losses[0] == pytest.approx(torch.tensor(61.0).log().item(), abs=0.4)
    first, second, third = (sum(losses[start : start + 10]) / 10 for start in (0, 10, 20))
    assert third < second < first
    assert losses[-1] < losses[0] - 2


CHECKPOINTS = {
    "bamba": "bamba",
    "command_a": "cohere2",
    "deepseek_v2_lite": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deltanet": "delta_net",
    "deepseek_v3_2": "deepseek_v32",
    "falcon_h1": "falcon_h1",
    "falcon_mamba": "falcon_mamba",
    "gated_deltanet": "gated_deltanet",
    "gemma3": "gemma3_text",
    "gla": "gla",
    "gpt_oss": "gpt_oss",
    "granite4": "granitemoehybrid",
    "gsa": "gsa",
    "hgrn2": "hgrn2",
    "jamba_v0_1": "jamba",
    "kimi_linear": "kimi_linear",
    "lfm2": "lfm2",
    "llama4_maverick": "llama4_text",
    "llama4_scout": "llama4_text",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "minimax_m2": "minimax_m2",
    "minimax_text_01": "minimax",
    "mixtral": "mixtral",
    "nemotron_h": "nemotron_h",
    "olmo_hybrid": "olmo_hybrid",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "recurrent_gemma": "recurrent_gemma",
    "retnet": "retnet",
    "rwkv4": "rwkv",
    "rwkv7": "rwkv7",
    "xlstm": "xlstm",
    "zamba2": "zamba2",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_named_models_are_written_as_checkpoints_of_that_name(family):
    """Every size says what the model of the library is: none has a setting that its config.json cannot hold."""
    for preset, size in model_sizes().items():
        if size.partition("/")[0] == family:
            settings = OmegaConf.merge(compose_model(preset), {"vocabulary": 64})
            assert not known_families()[CHECKPOINTS[family]].config(OmegaConf.to_container(settings)).problems


def test_minimax_01_has_its_pattern_and_residuals():
    model = on_meta("minimax_01_1b")
    kinds = [type(mixer) for mixer in model.mixers]
    assert kinds == ([LightningAttention] * 7 + [SoftmaxAttention]) * 3
    assert all(isinstance(block, MiniMaxBlock) for block in model.blocks)
    assert model.blocks[5].alpha == pytest.approx((2 * 24) ** 0.25)
    assert model.mixers[7].rotary.rotation.dims == model.mixers[7].head_dim // 2
    factors = [mixer.slopes.layer_factor for mixer in model.mixers if isinstance(mixer, LightningAttention)]
    assert factors[7] == pytest.approx(1 - 8 / 23, abs=1e-4)  # the ninth layer of the whole model


@pytest.mark.slow
def test_transnormer_llm_is_as_its_code_has_it():
    for preset, width, depth, hidden, stated in (
        ("385m", 1024, 24, 2816, 385e6), ("1b", 2048, 16, 5632, 1e9), ("7b", 4096, 30, 11008, 6.8e9),
    ):  # fmt: skip
        model = on_meta(f"transnormer_llm_{preset}", 50_272)
        assert model.parameter_count() == 50_272 * width + depth * (5 * width**2 + 3 * width * hidden) + width
        assert model.parameter_count() == pytest.approx(stated, rel=0.01)
    assert [mixer.feature_map.lrpe is not None for mixer in model.mixers] == [True] + [False] * 29
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 3 * 30 + 1
    assert all(norm.weight is None for norm in norms)


def test_transnormer_attends_within_blocks_in_its_lower_half():
    masks = [getattr(mixer, "mask", None) for mixer in on_meta("transnormer_tiny").mixers]
    assert masks == [BlockLocal(64)] * 2 + [None] * 2


@pytest.mark.slow
def test_norms_are_chosen_for_all_blocks():
    x, width = torch.randn(1, 3, 192), 192
    for schemes in (Block, OutputNormBlock, PostNormBlock, SandwichBlock, ParallelBlock, MiniMaxBlock):
        model = build_model(
            "llama_tiny",
            norm="unweighted_rms",
            block={"_target_": f"longreach.models.block.{schemes.__name__}", "_partial_": True},
        )
        names = [name for name, _ in model.named_parameters() if "norm" in name]
        assert names == [], schemes
    torch.testing.assert_close(model.norm(x), torch.nn.functional.rms_norm(x, (width,), eps=model.norm.eps))
    with pytest.raises(ValueError, match=r"model\.norm must be one of rms, .*unweighted_rms, .*; got 'none'"):
        build_model("llama_tiny", norm="none")


def test_sliding_window_has_two_rope_bases():
    model = on_meta("sliding_window_8b")
    windows = [mixer.mask.window for mixer in model.mixers]
    assert windows == ([1024] * 5 + [None]) * 6
    assert {(mixer.mask.window, mixer.rotary.rotation.base) for mixer in model.mixers} == {(1024, 1e4), (None, 1e6)}
    assert all(mixer.qk_norm == "head" for mixer in model.mixers)


def test_residual_schemes_are_their_formulas():
    class Doubling(Part):
        def forward(self, x, seq):
            return 2 * x

    def normed(x):
        return torch.nn.functional.rms_norm(x, (8,), eps=1e-6)

    x, seq = torch.randn(1, 3, 8, dtype=torch.float64), Sequence.single(Documents.whole(1, 3))
    parts = {"parts": {"mixer": Doubling(), "feed_forward": Doubling()}, "width": 8, "norm_eps": 1e-6}
    alpha, half = 16**0.25, 16**0.25 + 2 * 0.5
    for block, step in (
        (Block(**parts), lambda x: x + 2 * normed(x)),
        (ScaledBlock(**parts, multiplier=0.25), lambda x: x + 0.25 * 2 * normed(x)),
        (OutputNormBlock(**parts), lambda x: x + normed(2 * x)),
        (PostNormBlock(**parts), lambda x: normed(x + 2 * x)),
        (SandwichBlock(**parts), lambda x: x + normed(2 * normed(x))),
        (MiniMaxBlock(**parts, depth=8, beta=0.5), lambda x: half * normed(x)),
    ):
        torch.testing.assert_close(block.double()(x, seq), step(step(x)))
    for name in parts["parts"]:
        parts["parts"][name].setting = f"model.mixers.{name}"
    known = {"known": ("mixer", "feed_forward", "other")}
    for mixers, step in ((["mixer"], lambda x: x + normed(2 * x)), (["other"], lambda x: x + 2 * normed(x))):
        torch.testing.assert_close(OutputNormBlock(**parts, **known, mixers=mixers).double()(x, seq), step(step(x)))
    with pytest.raises(ValueError, match=r"model\.block\.mixers must be names of model\.mixers \(mixer, .*got them\. "):
        OutputNormBlock(**parts, **known, mixers=["mixer", "them"])
    with pytest.raises(ValueError, match=r"model\.block\.multiplier must be positive; got 0\.0"):
        ScaledBlock(**parts, multiplier=0.0)
    torch.testing.assert_close(ParallelBlock(**parts).double()(x, seq), x + 4 * normed(x))
    assert MiniMaxBlock(**parts, depth=8).alpha == alpha
    assert MiniMaxBlock(**parts, depth=80).alpha == pytest.approx(3.5565588200778455, abs=1e-12)
