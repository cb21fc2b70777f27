"""Attention converted to other forms: the same outputs where it is exact, and errors that are those of the weights."""

from typing import Any

import pytest
import torch
from model_presets import randomise
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.models.conversion import Converted, block_sparse, grouped, latent, native_sparse
from longreach.models.mixers.softmax.attention import Attention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import InfLLMv2, MoBA
from longreach.models.mixers.sparse.native_sparse_attention import NativeSparseAttention
from longreach.parallel.sequence import Sequence

WIDTH, LENGTH = 24, 19
BASE: dict[str, Any] = {"heads": 6, "kv_heads": 3, "head_dim": 8}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8, "beta_fast": 4.0, "beta_slow": 1.0}


def made(settings: dict[str, Any], kind: type[Attention] = SoftmaxAttention) -> Attention:
    mixer = kind(width=WIDTH, **settings)
    randomise(mixer)
    return mixer


def out(mixer: torch.nn.Module) -> Tensor:
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return mixer.double()(x, Sequence.single(Documents.from_lengths([[12, 7], [LENGTH]], LENGTH))).detach()


def rebuilt(converted: Converted) -> torch.nn.Module:
    settings = {name: value for name, value in converted.settings.items() if not name.startswith("_")}
    mixer = (LatentAttention if "latent_rank" in settings else SoftmaxAttention)(width=WIDTH, **settings)
    mixer.load_state_dict(converted.weights)
    return mixer


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({}, (8, 3, 3 * 8)),
        ({"rope_base": None}, (0, 1, 2 * 3 * 8)),
        ({"kv_heads": 1, "bias": True, "output_bias": True, "key_multiplier": 0.5}, (8, 1, 8)),
        ({"rope_fraction": 0.5, "gate": "channel", "gate_rank": 3, "sink_logits": True}, (4, 3, 3 * (4 + 8))),
        ({"rope_scaling": YARN, "gate": "head", "bias": True}, (8, 3, 3 * 8)),
    ],
    ids=["rotated", "no positions", "one key head", "partly rotated", "YaRN"],
)
def test_grouped_attention_is_a_latent_attention(change: dict[str, Any], numbers: tuple[int, ...]) -> None:
    settings = {**BASE, **change}
    mixer = made(settings)
    converted = latent(mixer, settings, mixer.state_dict())
    assert not any(converted.errors.values())
    assert tuple(converted.settings[name] for name in ("rope_dim", "rope_heads", "latent_rank")) == numbers
    torch.testing.assert_close(out(rebuilt(converted)), out(mixer), atol=1e-12, rtol=1e-12)


def test_heads_that_differ_by_a_factor_keep_their_rotation_in_one() -> None:
    settings = {**BASE, "rope_scaling": YARN, "rope_fraction": 0.5}
    mixer = made(settings)
    with torch.no_grad():
        key = mixer.key.weight.view(3, 8, WIDTH)
        key[1, :4], key[2, :4] = 0.5 * key[0, :4], -2.0 * key[0, :4]
    converted = latent(mixer, settings, mixer.state_dict(), rope_heads=1)
    assert converted.errors == {"rotation": 0.0}
    assert (converted.settings["rope_heads"], converted.settings["latent_rank"]) == (1, 3 * 4 + 2 * 4 + 3 * 8)
    torch.testing.assert_close(out(rebuilt(converted)), out(mixer), atol=1e-5, rtol=1e-5)


def test_what_loses_its_rotation_is_the_least_that_it_can_be() -> None:
    """The heads apart from one of largest weight by frequency; at the first position nothing else changes."""
    mixer = made(BASE)
    converted = latent(mixer, BASE, mixer.state_dict(), rope_heads=1)
    key = mixer.key.weight.detach().double().view(3, 2, 4, WIDTH).permute(2, 0, 1, 3).flatten(2)
    values = torch.linalg.svdvals(key).square()
    expected = (1 - values[:, 0].sum() / values.sum()).sqrt()
    assert converted.errors["rotation"] == pytest.approx(float(expected), rel=1e-9)
    x = torch.randn(LENGTH, 1, WIDTH, dtype=torch.float64)
    alone = Sequence.single(Documents.whole(LENGTH, 1))
    torch.testing.assert_close(rebuilt(converted).double()(x, alone), mixer.double()(x, alone), atol=1e-5, rtol=1e-5)


def test_a_latent_of_lower_rank_is_off_by_what_it_says() -> None:
    settings = {**BASE, "rope_base": None}
    mixer = made(settings)
    converted = latent(mixer, settings, mixer.state_dict(), latent_rank=15)
    weights = converted.weights["attend.weight"].double() @ converted.weights["latent.weight"].double()
    parts = weights.view(6, 16, WIDTH)[::2]  # the first query head of each group
    for part, found in (("key", parts[:, :8]), ("value", parts[:, 8:])):
        whole = mixer.get_submodule(part).weight.detach().double()
        off = float((found.reshape(24, WIDTH) - whole).norm() / whole.norm())
        assert converted.errors[f"{part}s"] == pytest.approx(off, rel=1e-5)
        assert 0.05 < off < 0.7
    assert not latent(mixer, settings, mixer.state_dict(), latent_rank=WIDTH).errors["values"]  # their true rank


@pytest.mark.parametrize("kind", [SoftmaxAttention, MoBA])
def test_heads_are_pooled_to_their_mean(kind: type[Attention]) -> None:
    settings = {**BASE, "heads": 4, "kv_heads": 4, "bias": True, "qk_norm": "head"}
    mixer = made(settings, kind)
    converted = grouped(mixer, settings, mixer.state_dict(), 2)
    key = torch.cat([mixer.key.weight.detach(), mixer.key.bias.detach().unsqueeze(1)], dim=1).view(2, 2, 8, WIDTH + 1)
    torch.testing.assert_close(converted.weights["key.weight"].view(2, 8, WIDTH), key.mean(1)[..., :-1])
    off = float((key - key.mean(1, keepdim=True)).norm() / key.norm())
    assert converted.errors["keys"] == pytest.approx(off, rel=1e-5)
    with torch.no_grad():
        for name in ("key", "value"):
            for x in mixer.get_submodule(name).parameters():
                x.view(2, 2, 8, -1).copy_(x.view(2, 2, 8, -1)[:, :1].clone())
    converted = grouped(mixer, settings, mixer.state_dict(), 2)
    assert converted.errors == {"keys": 0.0, "values": 0.0}
    assert converted.settings == {**settings, "kv_heads": 2}
    if kind is SoftmaxAttention:
        torch.testing.assert_close(out(rebuilt(converted)), out(mixer), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        ({"qk_norm": "head"}, {}, "qk_norm must be None for form=latent.*got 'head'"),
        ({"window": 4}, {}, "window must be None for form=latent.*got 4"),
        ({"conv_size": 4}, {}, "conv_size must be None for form=latent"),
        ({"softcap": 30.0}, {}, "softcap must be None for form=latent"),
        ({}, {"rope_heads": 4}, "rope_heads must be 1 … 3, the rotated key heads"),
        ({"rope_base": None}, {"rope_heads": 1}, "rope_heads must be left out"),
        ({}, {"latent_rank": 25}, "latent_rank must be 1 … 24"),
    ],
)
def test_what_has_no_latent_form_is_named(change: dict[str, Any], asked: dict[str, int], message: str) -> None:
    settings = {**BASE, **change}
    mixer = made(settings)
    with pytest.raises(ValueError, match=message):
        latent(mixer, settings, mixer.state_dict(), **asked)


def test_heads_that_cannot_be_pooled_are_named() -> None:
    for change, left, message in (
        ({}, 2, "kv_heads must be a smaller divisor of the 3"),
        ({}, 3, "kv_heads must be a smaller divisor of the 3"),
        ({"qk_norm": "full"}, 1, "mixers must have no conv_size and no qk_norm=full"),
    ):
        mixer = made({**BASE, **change})
        with pytest.raises(ValueError, match=message):
            grouped(mixer, {**BASE, **change}, mixer.state_dict(), left)


NEAR = {"block_size": 4, "initial": 1, "local": 1, "window_size": 4, "window_stride": 2}
SPARSE: dict[str, tuple[type[torch.nn.Module], dict[str, Any], int]] = {
    "moba": (MoBA, {"block_size": 4, "top_k": 3}, 12),
    "infllm_v2": (InfLLMv2, {**NEAR, "count": 3, "dense_length": 2}, 12),
    "infllm_v2 dense": (InfLLMv2, {**NEAR, "count": 2, "dense_length": 13}, 13),
    "nsa": (NativeSparseAttention, {**NEAR, "count": 3, "near": 5}, 12),
    "nsa of means": (NativeSparseAttention, {**NEAR, "count": 3, "near": 5, "compression": "mean"}, 12),
}


@pytest.mark.parametrize("form", SPARSE)
@pytest.mark.parametrize(
    "change",
    [{"rope_fraction": 0.5}, {"qk_norm": "head", "conv_size": 3, "rope_scaling": YARN}],
    ids=["plain", "norms and convolution"],
)
def test_sparse_attention_begins_as_full_attention_where_it_lists_all_blocks(form: str, change: dict[str, Any]) -> None:
    """To the position that is said, and no further."""
    (kind, given, until), settings = SPARSE[form], {**BASE, **change}
    mixer = made(settings)
    if kind is NativeSparseAttention:
        converted = native_sparse(mixer, settings, mixer.state_dict(), given)
    else:
        converted = block_sparse(mixer, settings, mixer.state_dict(), form.split()[0], given)
    assert (converted.errors, converted.exact_until) == ({}, until)
    assert converted.settings["_target_"].endswith(kind.__name__)
    sparse = kind(width=WIDTH, **{name: value for name, value in converted.settings.items() if name[0] != "_"})
    sparse.load_state_dict(converted.weights)
    off = (out(sparse) - out(mixer)).abs().amax(-1)[1]  # a document of the whole row
    assert off[:until].max() < 1e-9
    assert off[until] > 1e-3


def test_native_sparse_attention_begins_with_branches_that_learn() -> None:
    """No parameter of the new branches is without gradient after a step that moves values off 0."""
    mixer = made({**BASE, "key_multiplier": 0.5})
    settings = {**BASE, "key_multiplier": 0.5}
    converted = native_sparse(mixer, settings, mixer.state_dict(), SPARSE["nsa"][1])
    assert converted.report == ("exact at positions below 12 of a document; new: gate, compress_keys, compress_values")
    sparse = NativeSparseAttention(
        width=WIDTH, **{name: value for name, value in converted.settings.items() if name[0] != "_"}
    )
    sparse.load_state_dict(converted.weights)
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        sparse.zero_grad()
        sparse(x, Sequence.single(Documents.whole(1, LENGTH))).square().sum().backward()
        with torch.no_grad():
            for parameter in sparse.parameters():
                parameter -= 1e-3 * parameter.grad
    assert all(parameter.grad.abs().max() > 0 for parameter in sparse.parameters())
    compression = sparse.compress_values
    assert compression is not None
    assert (compression.first.weight.grad.abs().amax(1) > 0).sum() >= 16  # those that make the mean


def test_sparse_forms_refuse_what_they_have_not() -> None:
    for change, message in (
        ({"window": 4}, "window must be None for form=nsa"),
        ({"bias": True}, "bias must be False for form=nsa"),
        ({"qk_norm": "full"}, "qk_norm must be null or head for form=nsa; got full"),
    ):
        mixer = made({**BASE, **change})
        with pytest.raises(ValueError, match=message):
            native_sparse(mixer, {**BASE, **change}, mixer.state_dict(), {})
    mixer = made(BASE)
    for given, message in (
        ({"shared_kv": True}, "mixer must hold settings .*; got shared_kv. Remove it"),
        ({"compression_hidden": 15}, "compression_hidden must be at least 16, twice head_dim, .*; got 15"),
    ):
        with pytest.raises(ValueError, match=message):
            native_sparse(mixer, BASE, mixer.state_dict(), given)
    with pytest.raises(ValueError, match="sink_logits must be False for form=moba"):
        block_sparse(mixer, {**BASE, "sink_logits": True}, mixer.state_dict(), "moba", {})
