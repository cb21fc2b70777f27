"""What the planner says that ranks send is what they send: real steps of small models, on threads, are counted."""

from functools import partial

import pytest
import torch
from distributed import run_threads

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
from longreach.trainer.planning.layers import Shallow
from longreach.trainer.planning.sending import calls
from longreach.trainer.ranks.settings import layout_of, strategy_of, ulysses_ranks
from longreach.trainer.settings import Settings

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


def build(mixers: tuple[str, ...], checkpointing: str) -> LanguageModel:
    return LanguageModel(
        vocabulary=64,
        width=16,
        depth=len(mixers),
        pattern=list(mixers),
        mixers={name: MIXERS[name] for name in mixers},
        feed_forward=partial(SwiGLU, hidden=24),
        activation_checkpointing=checkpointing,
    )


def settings_of(ranks: int, attention: str, recurrent: str, ulysses: int | None, layout: str = "zigzag") -> Settings:
    settings = Settings()
    parallel = settings.parallel
    parallel.sequence, parallel.layout = ranks, layout
    parallel.attention, parallel.recurrent, parallel.ulysses = attention, recurrent, ulysses
    settings.data.sequence_length = LENGTH
    return settings


def step(rank: int, world: int, model: LanguageModel, settings: Settings) -> int:
    """Bytes that this rank sends in a step."""
    mesh = Mesh.create(world, ulysses_ranks(settings.parallel))
    layout = layout_of(settings.parallel, LENGTH)
    seq = Sequence.shared(Documents.whole(1, LENGTH), layout, mesh, strategy_of(settings.parallel))
    tokens = torch.zeros(1, layout.local_length, dtype=torch.int64)
    with counting() as sent:
        loss, _ = model(tokens, seq, tokens)
        loss.backward()
    return sum(sent.values())


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mixers", "ranks", "attention", "recurrent", "ulysses", "checkpointing"), CASES)
def test_ranks_send_what_is_predicted(mixers, ranks, attention, recurrent, ulysses, checkpointing, layout) -> None:
    settings = settings_of(ranks, attention, recurrent, ulysses, layout)
    make = partial(build, mixers, checkpointing)
    predicted = [
        sum(call.bytes * number for call, number in calls(make, settings, rank).items()) for rank in range(ranks)
    ]
    model = make()
    model.initialise(0)
    assert run_threads(ranks, step, model, settings) == predicted
    assert sum(predicted) > 0


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
