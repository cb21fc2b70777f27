"""What the planner says that ranks send is what they send: real steps of small models, on threads, are counted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from distributed import run_threads

from longreach.benchmarks.planner.even import EvenExperts
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.delta.gated_deltanet import GatedDeltaNet
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.collectives import counting
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.planning.cluster import ClusterSettings
from longreach.trainer.planning.estimate import Estimator
from longreach.trainer.planning.layers import Shallow
from longreach.trainer.planning.sending import calls
from longreach.trainer.ranks.settings import layout_of, strategy_of, ulysses_ranks
from longreach.trainer.settings import Settings
from longreach.trainer.zero.experts import cut_as_made

LENGTH = 128
MIXERS = {
    "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2),
    "window": partial(SoftmaxAttention, heads=4, window=20),
    "latent": partial(LatentAttention, **{**LatentAttention.small, "heads": 4}),
    "lightning": partial(LightningAttention, heads=4),
    "delta": partial(GatedDeltaNet, heads=4, key_dim=8),
}
CASES = [  # mixers, ranks, attention, recurrent, ulysses, checkpointing
    (("softmax", "lightning"), 4, "ring", "state_passing", None, "none"),
    (("window", "delta"), 4, "ring", "state_passing", None, "full"),
    (("softmax", "delta"), 2, "gather", "state_passing", None, "mixing"),
    (("softmax", "lightning"), 4, "ulysses", "ulysses", 2, "full"),
    (("latent", "delta"), 2, "ring", "ulysses", 2, "none"),
]


FEED_FORWARD = partial(SwiGLU, hidden=24)


def build(mixers: tuple[str, ...], checkpointing: str, feed_forward: Any = FEED_FORWARD, **more: Any) -> LanguageModel:
    return LanguageModel(
        vocabulary=64,
        width=16,
        depth=len(mixers),
        pattern=list(mixers),
        mixers={name: MIXERS[name] for name in mixers},
        feed_forward=feed_forward,
        activation_checkpointing=checkpointing,
        **more,
    )


def settings_of(ranks: int, attention: str, recurrent: str, ulysses: int | None, layout: str = "zigzag") -> Settings:
    settings = Settings()
    parallel = settings.parallel
    parallel.sequence, parallel.layout = ranks, layout
    parallel.attention, parallel.recurrent, parallel.ulysses = attention, recurrent, ulysses
    settings.data.sequence_length = LENGTH
    return settings


def step(rank: int, world: int, make: Callable[[], LanguageModel], settings: Settings) -> int:
    """Bytes that this rank sends in a step."""
    parallel = settings.parallel
    mesh = Mesh.create(parallel.sequence, ulysses_ranks(parallel), parallel.experts)
    with cut_as_made(mesh.experts):
        model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    layout = layout_of(parallel, LENGTH)
    seq = Sequence.shared(Documents.whole(1, LENGTH), layout, mesh, strategy_of(parallel))
    tokens = torch.zeros(1, layout.local_length, dtype=torch.int64)
    with counting() as sent:
        loss, _, reports = model(tokens, seq, tokens, False, True)
        torch.stack([loss, *(reports[path] for path in model.losses)]).sum().backward()
    return sum(sent.values())


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mixers", "ranks", "attention", "recurrent", "ulysses", "checkpointing"), CASES)
def test_ranks_send_what_is_predicted(mixers, ranks, attention, recurrent, ulysses, checkpointing, layout) -> None:
    settings = settings_of(ranks, attention, recurrent, ulysses, layout)
    make = partial(build, mixers, checkpointing)
    predicted = [
        sum(call.bytes * number for call, number in calls(make, settings, rank).items()) for rank in range(ranks)
    ]
    assert run_threads(ranks, step, make, settings) == predicted
    assert sum(predicted) > 0


EXPERTS = partial(EvenExperts, hidden=12, shared_hidden=8)
AHEAD = {"feed_forward": EXPERTS, "multi_token_prediction": 2}
EXPERT_CASES = [  # world, ranks of a row, ranks of the experts, checkpointing, tiles, more of the model
    (4, 2, 4, "full", None, {"feed_forward": EXPERTS}),
    (4, 4, 2, "mixing", 8, {"feed_forward": EXPERTS}),
    (4, 1, 4, "none", 16, {"feed_forward": EXPERTS}),
    (2, 2, 1, "full", None, {"multi_token_prediction": 2}),
    pytest.param(4, 4, 4, "none", None, AHEAD, marks=pytest.mark.slow),
    pytest.param(4, 2, 2, "full", 8, AHEAD, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "sequence", "experts", "checkpointing", "tiles", "more"), EXPERT_CASES)
def test_tokens_for_experts_and_tokens_ahead_are_what_is_predicted(
    world, sequence, experts, checkpointing, tiles, more
) -> None:
    """By the estimate, with its rules for what runs again; loads are even, as the planner has them."""
    settings = settings_of(sequence, "ring", "state_passing", None, "zigzag" if sequence > 1 else "contiguous")
    settings.parallel.experts = experts
    settings.trainer.activation_checkpointing, settings.trainer.tile_tokens = checkpointing, tiles
    settings.data.sequence_length = LENGTH
    mixers = ("softmax", "delta")
    cluster = ClusterSettings(gpus_per_node=2, node_gbps=1.0, network_gbps=1.0)

    def made(model: dict[str, Any]) -> LanguageModel:
        of = {"activation_checkpointing": "none", "tile_tokens": None, **model}
        return build(tuple(of["pattern"]), of["activation_checkpointing"], tile_tokens=of["tile_tokens"], **more)

    estimator = Estimator(made, {"pattern": list(mixers), "depth": 2})
    sent, _ = estimator.sent(settings, cluster)
    predicted = sum(sum(of.bytes.values()) for of in sent.values())
    make = partial(build, mixers, checkpointing, tile_tokens=tiles, **more)
    assert run_threads(world, step, make, settings)[sequence - 1] == predicted
    shown = {mixer for mixer, *_ in sent}
    assert {"experts", "multi-token prediction"} & shown == (
        {
            *(["experts"] if experts > 1 else []),
            *(["multi-token prediction"] if "multi_token_prediction" in more else []),
        }
    )


def test_deep_models_are_counted_from_shallow_ones() -> None:
    """A hybrid of two kinds of layers, by the sum over its kinds and by itself."""
    names = ["lightning"] * 3 + ["softmax"] + ["lightning"] * 3 + ["softmax"]

    def made(model: dict) -> LanguageModel:
        mixers = {name: MIXERS[name] for name in set(model["pattern"])}
        return LanguageModel(vocabulary=64, width=16, mixers=mixers, feed_forward=partial(SwiGLU, hidden=24), **model)

    model = {"pattern": names, "depth": 8}
    settings = settings_of(4, "ring", "state_passing", None)
    shallow = Shallow.of(made, model, names)
    assert {name: layers for name, (layers, _) in shallow.more.items()} == {"lightning": 5, "softmax": 1}
    found = shallow.sum(lambda build: calls(build, settings))
    assert found == dict(calls(lambda: made(model), settings))
