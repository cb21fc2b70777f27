"""A setting without effect in the configured model is an error, told before anything is made."""

from functools import partial
from typing import Any

import pytest

from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.delta.rwkv7 import RWKV7
from longreach.models.mixers.elementwise.gated_memory_unit import GatedMemoryUnit
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.key_values import KeyValues
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import MoBA
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.trainer.engine import EngineSettings
from longreach.trainer.preparation import check_model
from longreach.trainer.ranks.settings import ParallelSettings
from longreach.trainer.settings import KernelSettings, Settings

PARTS = {
    "softmax": partial(SoftmaxAttention, heads=4),
    "one_head": partial(SoftmaxAttention, heads=1),
    "one_linear_head": partial(LightningAttention, heads=1),
    "delta": partial(GatedDeltaNet, heads=4, key_dim=8, value_dim=8),
    "mamba": partial(Mamba, **Mamba.small),
    "published": partial(Mamba, **Mamba.small, publish=True),
    "memory": partial(GatedMemoryUnit, memory_of="published"),
    "shared": partial(SoftmaxAttention, heads=4, share=2),
    "keys": partial(KeyValues, kv_heads=2, head_dim=8),
    "cross": partial(SoftmaxAttention, heads=4, keys_of="keys"),
    "rwkv7": partial(RWKV7, head_dim=8, **RWKV7.small),
    "moba": partial(MoBA, heads=4, block_size=4, top_k=2),
    "dense_first": partial(MoBA, heads=4, block_size=4, top_k=2, dense_steps=5),
}


def check(
    *parts: str,
    kernels: dict[str, str] | None = None,
    parallel: dict[str, Any] | None = None,
    feed_forward: bool = True,
    compiled: bool = False,
    stage: int = 1,
) -> None:
    settings = Settings(kernels=KernelSettings(**kernels or {}), parallel=ParallelSettings(**parallel or {}))
    settings.data.sequence_length, settings.trainer.compile = 64, compiled
    settings.engine = EngineSettings(zero_stage=stage)

    def build(model: dict[str, Any]) -> LanguageModel:
        mixers = {name: PARTS[name] for name in parts}
        swiglu = partial(SwiGLU, hidden=48) if feed_forward else None
        return LanguageModel(pattern=list(parts), mixers=mixers, feed_forward=swiglu, **model)

    check_model(build, {"vocabulary": 61, "width": 32, "depth": len(parts)}, settings)


@pytest.mark.parametrize(
    ("parts", "kernels"),
    [
        (("softmax",), {"softmax_attention": "reference", "rms_norm": "chunked", "cross_entropy": "chunked"}),
        (("softmax", "delta"), {"delta_rule": "chunked", "short_conv": "reference", "swiglu": "chunked"}),
        (("mamba",), {"selective_scan": "reference", "short_conv": "chunked"}),
        (("moba",), {"block_sparse_attention": "chunked", "select_blocks": "reference"}),
        (("dense_first",), {"block_sparse_attention": "chunked", "softmax_attention": "chunked"}),
    ],
)
def test_backends_of_the_models_ops_are_accepted(parts: tuple[str, ...], kernels: dict[str, str]) -> None:
    check(*parts, kernels=kernels)


@pytest.mark.parametrize(
    ("parts", "kernels", "message"),
    [
        (
            ("softmax",),
            {"delta_rule": "chunked"},
            r"kernels.delta_rule must be auto for a model that does not have it; got chunked. "
            r"The model has softmax_attention, rms_norm, swiglu, cross_entropy$",
        ),
        (("mamba",), {"softmax_attention": "library"}, "The model has selective_scan, short_conv, rms_norm, swiglu,"),
        (
            ("delta",),
            {"select_blocks": "reference", "softmax_attention": "chunked"},
            "kernels.softmax_attention and kernels.select_blocks must be auto .* got chunked and reference",
        ),
        (("moba",), {"softmax_attention": "chunked"}, "kernels.softmax_attention must be auto"),
    ],
)  # fmt: skip
def test_backends_of_other_ops_are_refused(parts: tuple[str, ...], kernels: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*parts, kernels=kernels)


def test_a_backend_without_a_feed_forward_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels\.swiglu must be auto for a model that does not have it"):
        check("softmax", kernels={"swiglu": "chunked"}, feed_forward=False)


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "short_conv"])
def test_a_backend_of_what_torch_compiles_is_refused(op: str) -> None:
    for stage, kernels in ((1, {op: "chunked"}), (3, {op: "triton"})):
        check("delta", kernels=kernels, compiled=True, stage=stage)
    with pytest.raises(ValueError, match=f"kernels.{op} must be auto or chunked with trainer.compile.*got triton"):
        check("delta", kernels={op: "triton"}, compiled=True)


@pytest.mark.parametrize(
    ("parts", "parallel"),
    [
        (("softmax",), {"attention": "gather"}),
        (("dense_first",), {"attention": "gather"}),
        (("delta",), {"recurrent": "ulysses", "sequence": 2}),
        (("one_head", "delta"), {"recurrent": "ulysses", "sequence": 2}),
        (("softmax", "one_linear_head"), {"attention": "ulysses", "sequence": 2}),
        (("softmax", "delta"), {"attention": "ulysses", "mixers": {"softmax": "gather", "delta": "ulysses"}}),
    ],
)
def test_strategies_of_the_models_mixers_are_accepted(parts: tuple[str, ...], parallel: dict[str, Any]) -> None:
    check(*parts, parallel=parallel)


@pytest.mark.parametrize(
    ("parts", "parallel", "message"),
    [
        (("delta",), {"attention": "gather"}, "parallel.attention must be ring for a model .* got gather"),
        (("moba",), {"attention": "gather"}, "parallel.attention must be ring for a model .* got gather"),
        (("softmax",), {"recurrent": "ulysses"}, "parallel.recurrent must be state_passing for a model .* got ulysses"),
        (
            ("softmax", "delta"),
            {"mixers": {"delta": "gather"}},
            "parallel.mixers.delta must be one of state_passing, ulysses.* got gather",
        ),
        (("softmax",), {"mixers": {"softmax": "state_passing"}}, "must be one of ring, gather, ulysses"),
        (("softmax", "moba"), {"mixers": {"moba": "gather"}}, "parallel.mixers.moba must be left out"),
    ],
)  # fmt: skip
def test_strategies_of_other_mixers_are_refused(parts: tuple[str, ...], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*parts, parallel=parallel)


@pytest.mark.parametrize(
    ("part", "unread"),
    [
        ("shared", "shared.keys, shared.values"),
        ("keys", "keys.keys, keys.values"),
        ("published", "published.memory"),
    ],
)
def test_keys_and_memories_that_no_layer_reads_are_refused(part: str, unread: str) -> None:
    with pytest.raises(ValueError, match=rf"mixers\.{part} must be read by a later layer; .* none reads {unread}\."):
        check("softmax", part)


@pytest.mark.parametrize("parts", [("shared", "softmax", "shared"), ("keys", "cross"), ("published", "memory")])
def test_those_that_a_layer_reads_are_accepted(parts: tuple[str, ...]) -> None:
    check(*parts)


def test_what_a_model_of_one_layer_publishes_by_itself_is_accepted() -> None:
    check("rwkv7")
