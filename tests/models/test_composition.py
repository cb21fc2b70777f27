"""Blocks by composition: mixers side by side and in sequence, residual schemes, feed-forward layers that see tokens."""

from functools import partial

import pytest
import torch
from distributed import run_threads
from model_presets import WIDTH, feed_forward, mixer_partial, randomise, tokens
from torch import nn
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.models.block import ParallelBlock, SandwichBlock, SideBySide
from longreach.models.decoding import next_logits
from longreach.models.language_model import LanguageModel
from longreach.models.part import FeedForward
from longreach.models.pattern import expand_pattern, stages
from longreach.models.streams.attention_residuals import AttentionResidualBlock
from longreach.models.streams.hyper_connections import HyperConnectionBlock, ManifoldHyperConnectionBlock
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 48
LENGTHS = [[5, 30], [LENGTH]]  # the first row ends in padding
PACKED = Documents.from_lengths(LENGTHS, LENGTH)


class ShiftedMLP(FeedForward):
    """A channel mixer that looks at the token before, with a slot of the name that RWKV-7's shift has too."""

    def __init__(self, *, width, hidden=40):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x, seq):
        return self.down(F.relu(self.up(torch.lerp(x, ops.token_shift(x, seq=seq), 0.4))).square())


COMPOSITIONS = {
    "side by side": {"pattern": ["softmax_attention+mamba2", "gated_linear_attention"]},
    "in sequence": {"pattern": ["mamba|softmax_attention", "lightning_attention|lightning_attention"]},
    "both": {"pattern": ["mamba|softmax_attention+gated_deltanet*2"]},
    "normed and scaled": {
        "pattern": ["rwkv7+softmax_attention"], "side_by_side": partial(SideBySide, norms=True, scales=True),
        "feed_forward": partial(ShiftedMLP),
    },
    "multiplied": {
        "pattern": ["mamba2+softmax_attention"],
        "side_by_side": partial(SideBySide, input_multipliers={"mamba2": 1.3}, multipliers={"softmax_attention": 0.6}),
        "embedding_multiplier": 1.5, "logit_multiplier": 0.3,
    },
    "parallel": {
        "pattern": ["softmax_attention", "rwkv7"], "block": ParallelBlock, "feed_forward": partial(ShiftedMLP),
    },
    "hyper-connections": {
        "pattern": ["mamba2|softmax_attention", "softmax_attention"], "block": partial(HyperConnectionBlock, streams=3),
    },
    "manifold": {
        "pattern": ["softmax_attention", "rwkv7"],
        "block": partial(ManifoldHyperConnectionBlock, streams=3, iterations=4), "feed_forward": partial(ShiftedMLP),
    },
    "attention residuals": {
        "pattern": ["mamba2|softmax_attention", "softmax_attention", "rwkv7"], "depth": 3,
        "block": AttentionResidualBlock,
    },
    "attention residuals of 2": {
        "pattern": ["mamba2|softmax_attention", "softmax_attention"],
        "block": partial(AttentionResidualBlock, block_size=2), "depth": 4,
    },
    "sandwich": {"pattern": ["lightning_attention+gated_linear_attention"], "block": SandwichBlock},
}  # fmt: skip


def compose(pattern, depth=2, checkpointing="none", **changes):
    if "mixers" not in changes:
        names = {name for item in pattern for together in stages(item.partition("*")[0]) for name in together}
        changes["mixers"] = {name: mixer_partial(name) for name in names}
    settings = {"feed_forward": feed_forward(40), **changes}
    model = LanguageModel(
        vocabulary=61, width=WIDTH, depth=depth, pattern=pattern, activation_checkpointing=checkpointing, **settings
    ).double()
    randomise(model)
    return model


def composed(name, checkpointing="none"):
    return compose(**COMPOSITIONS[name], checkpointing=checkpointing)


def test_a_pattern_says_which_mixers_stand_side_by_side_and_in_sequence():
    assert expand_pattern(["a+b*2", "c"], 3, ["a", "b", "c"]) == ["a+b", "a+b", "c"]
    assert stages("a|b+c") == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (["a+d"], r"names of model.mixers \(a, b\); got 'd'"),
        (["a+", "b"], r"names of model.mixers \(a, b\); got ''"),
        (["a|", "b"], "got ''"),
        (["a+a", "b"], r"different mixers side by side; got 'a\+a'"),
        (["a+b*0"], r"positive number, as in a\+b\*3"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_pattern(pattern, len(pattern), ["a", "b"])


def test_a_hybrid_with_mixers_side_by_side_is_a_configuration_without_code():
    mixers = "longreach.models.mixers"
    model = build(
        {
            "_target_": "longreach.models.language_model.LanguageModel",
            "vocabulary": 61,
            "width": 32,
            "depth": 2,
            "pattern": ["softmax+mamba", "mamba"],
            "mixers": {
                "softmax": {
                    "_target_": f"{mixers}.softmax.softmax_attention.SoftmaxAttention", "_partial_": True, "heads": 4,
                },
                "mamba": {"_target_": f"{mixers}.state_space.mamba.Mamba", "_partial_": True, "state": 4},
            },
            "side_by_side": {"_target_": "longreach.models.block.SideBySide", "_partial_": True, "scales": True},
            "feed_forward": {
                "_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 48,
            },
        }
    )  # fmt: skip
    model.initialise(0)
    names = {name for name, _ in model.named_parameters()}
    assert {"blocks.0.mixer.softmax.query.weight", "blocks.0.mixer.mamba.A_log", "blocks.1.mixer.A_log"} <= names
    assert (model.blocks[0].mixer.scales == 0.5).all()
    assert model.names == ["softmax+mamba", "mamba"]
    outputs = [model.blocks[0].mixer.softmax.output, model.blocks[1].mixer.output, model.blocks[0].feed_forward.down]
    assert [layer.weight.std().item() for layer in outputs] == pytest.approx([0.01] * 3, rel=0.1)


def test_outputs_side_by_side_are_summed_and_parts_in_sequence_have_their_own_norms():
    seq, x = Sequence.single(PACKED), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    block = composed("both").blocks[0]
    assert list(block.names) == ["mixer_1", "mixer_2", "feed_forward"]
    y = x + block.mixer_1(block.mixer_1_norm(x), seq)
    normed = block.mixer_2_norm(y)
    y = y + block.mixer_2.softmax_attention(normed, seq) + block.mixer_2.gated_deltanet(normed, seq)
    y = y + block.feed_forward(block.feed_forward_norm(y), seq)
    torch.testing.assert_close(block(x, seq), y, atol=1e-12, rtol=1e-12)


def test_a_pattern_may_place_feed_forward_layers_itself():
    mixers = {"softmax": mixer_partial("softmax_attention"), "dense": feed_forward(40), "wide": feed_forward(80)}
    model = compose(["softmax|dense", "softmax|wide*3"], depth=4, mixers=mixers, feed_forward=None)
    assert [block.mixer_2.gate.out_features for block in model.blocks] == [40, 80, 80, 80]
    parallel = compose(["softmax+dense"], mixers={k: mixers[k] for k in ("softmax", "dense")}, feed_forward=None)
    assert list(parallel.blocks[0].names) == ["mixer"]
    assert parallel(tokens(2, LENGTH), Sequence.single(PACKED)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side_by_side": SideBySide, "pattern": ["mamba"]}, "side_by_side must come with a pattern that has mixers"),
        ({"block": lambda parts: nn.Identity()}, "model.block must join parts; got Identity"),
        (
            {"pattern": ["mamba+run"], "mixers": {"mamba": mixer_partial("mamba"), "run": feed_forward(8)}},
            "must have other names side by side; got 'run'. Rename that mixer",
        ),
    ],
)
def test_compositions_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compose(**{"pattern": ["mamba"], **changes})


@pytest.mark.parametrize("name", COMPOSITIONS)
@torch.no_grad()
def test_a_packed_document_gives_what_it_gives_alone(name):
    model, inputs = composed(name), tokens(2, LENGTH)
    whole = model(inputs, Sequence.single(PACKED))
    for row, start, length in ((0, 0, 5), (0, 5, 30), (1, 0, LENGTH)):
        alone = model(inputs[row : row + 1, start : start + length], Sequence.single(Documents.whole(1, length)))
        torch.testing.assert_close(whole[row, start : start + length], alone[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", COMPOSITIONS)
@torch.no_grad()
def test_decoding_gives_the_full_forward(name):
    model, inputs, cache = composed(name), tokens(2, LENGTH), DecodingCache()
    expected = model(inputs, Sequence.single(Documents.whole(2, LENGTH)))
    for start, stop in [(0, 20), (20, 21), (21, 22), (22, 40), *((t, t + 1) for t in range(40, LENGTH))]:
        torch.testing.assert_close(
            next_logits(model, inputs[:, start:stop], cache), expected[:, stop - 1], atol=1e-9, rtol=1e-9
        )
    assert cache.bytes > 0


def loss_and_gradients(model, seq):
    targets = tokens(2, LENGTH).roll(-1, dims=1)
    targets[0, 34:] = targets[0, 4] = targets[1, -1] = -100
    loss, _ = model(seq.shard(tokens(2, LENGTH)), seq, seq.shard(targets))
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("checkpointing", ["full", "mixing"])
def test_recomputation_changes_no_gradient(name, checkpointing):
    seq = Sequence.single(PACKED)
    found, expected = (loss_and_gradients(composed(name, setting), seq) for setting in (checkpointing, "none"))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def on_one_of(rank, world, name, checkpointing, strategy):
    seq = Sequence(PACKED, Layout(LENGTH, world, 2), rank, Mesh.create(world).sequence_group, strategy=strategy)
    loss, gradients = loss_and_gradients(composed(name, checkpointing), seq)
    return loss, [gradient.numpy() for gradient in gradients]


def compare_ranks(name, checkpointing, strategy):
    results = run_threads(2, on_one_of, name, checkpointing, strategy)
    loss, gradients = loss_and_gradients(composed(name), Sequence.single(PACKED))
    torch.testing.assert_close(sum(local for local, _ in results), loss, atol=1e-9, rtol=1e-9)
    for index, expected in enumerate(gradients):
        total = sum(torch.from_numpy(local[index]) for _, local in results)
        torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_ranks_that_share_rows_give_what_one_gives(name):
    compare_ranks(name, "mixing", Strategy())


@pytest.mark.slow
def test_mixers_side_by_side_have_the_strategies_of_their_names():
    compare_ranks("side by side", "none", Strategy(mixers=(("softmax_attention", "gather"), ("mamba2", "ulysses"))))
