"""What parts report: auxiliary losses and sums, the same on any number of ranks, recomputed or not."""

from functools import partial

import pytest
import torch
from distributed import run_threads
from model_presets import randomise, small_hybrid, tokens
from routed import Routed

from longreach.kernels.documents import Documents
from longreach.models.part import FeedForward
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence

LENGTH = 48
LENGTHS = [[5, 30], [LENGTH]]  # the first row ends in padding
PACKED = Documents.from_lengths(LENGTHS, LENGTH)


def hybrid(checkpointing="none"):
    model = small_hybrid(
        "lightning_attention", feed_forward=partial(Routed, hidden=8), activation_checkpointing=checkpointing
    )
    randomise(model)
    return model


def gathered(model, seq):
    """Reports and gradients of a loss that holds them, averaged over the tokens of the whole rows."""
    inputs, targets = (seq.shard(x) for x in (tokens(2, LENGTH), tokens(2, LENGTH).roll(-1, dims=1)))
    loss, _, reports = model(inputs, seq, targets, False, True)
    counts = dict(zip(model.losses, model.loss_counts(PACKED), strict=True))
    total = loss + sum(weight * reports[path] / counts[path] for path, weight in model.losses.items())
    total.backward()
    reported = {path: value.detach() for path, value in reports.items()}
    return reported, [parameter.grad for parameter in model.parameters()]


def on_one_of(rank, world, checkpointing, spans):
    seq = Sequence(PACKED, Layout(LENGTH, world, spans), rank, Mesh.create(world).sequence_group)
    reported, gradients = gathered(hybrid(checkpointing), seq)
    return {path: value.numpy() for path, value in reported.items()}, [gradient.numpy() for gradient in gradients]


def test_reports_are_named_by_layer_and_the_token_loss_holds_none_of_them():
    model, seq = hybrid(), Sequence.single(PACKED)
    inputs = tokens(2, LENGTH)
    loss, count = model(inputs, seq, inputs)
    alone, _, reports = model(inputs, seq, inputs, False, True)
    assert torch.equal(loss, alone)
    assert count == 2 * LENGTH
    names = [f"blocks.{layer}.feed_forward.{name}" for layer in range(4) for name in ("z", "balance", "load", "mean")]
    assert list(reports) == names
    assert list(model.losses) == [name for name in names if name.endswith((".z", ".balance"))]
    assert model.losses["blocks.2.feed_forward.z"] == 0.05
    assert model.sums == [name for name in names if name.endswith((".load", ".mean"))]


def test_padding_counts_for_nothing():
    model = hybrid()
    assert model.loss_counts(PACKED) == [5 + 30 + LENGTH] * 8
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    layer = model.blocks[0].feed_forward
    _, *whole = layer(x, Sequence.single(PACKED))
    pieces = []
    for row, start, length in ((0, 0, 5), (0, 5, 30), (1, 0, LENGTH)):
        piece = x[row : row + 1, start : start + length]
        pieces.append(layer(piece, Sequence.single(Documents.whole(1, length)))[1:])
    torch.testing.assert_close(whole, [sum(parts) for parts in zip(*pieces, strict=True)], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("checkpointing", ["full", "mixing"])
def test_recomputation_reports_once(checkpointing):
    expected, found = (
        gathered(hybrid(), Sequence.single(PACKED)),
        gathered(hybrid(checkpointing), Sequence.single(PACKED)),
    )
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("world", "spans", "checkpointing"), [(2, 2, "full"), (2, 1, "mixing"), (4, 2, "none")])
def test_ranks_that_share_rows_report_what_one_reports(world, spans, checkpointing):
    results = run_threads(world, on_one_of, checkpointing, spans)
    reported, gradients = gathered(hybrid(), Sequence.single(PACKED))
    for path, expected in reported.items():
        total = sum(torch.from_numpy(local[path]) for local, _ in results)
        torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)
    for index, expected in enumerate(gradients):
        total = sum(torch.from_numpy(local[index]) for _, local in results)
        torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)


def test_each_part_is_told_its_own_sums():
    model = hybrid().float()
    told = {path: torch.zeros(3 if path.endswith("load") else 32, dtype=torch.float64) for path in model.sums}
    told["blocks.1.feed_forward.load"] = torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)
    for path in model.sums:
        if path.endswith("load") and not told[path].any():
            told[path] += 4
    model.update(told)
    assert [block.feed_forward.bias.tolist() for block in model.blocks] == [
        pytest.approx([0, 0, 0] if layer != 1 else [-0.1, 0.1, 0.1]) for layer in range(4)
    ]


class Unheard(FeedForward):
    sums = ("load",)

    def forward(self, x, seq):
        return x, x.sum()


class Unweighed(FeedForward):
    losses = ("z",)

    def forward(self, x, seq):
        return x, x.sum()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Unheard, "model.feed_forward must define update, which is told its sums; Unheard has none"),
        (Unweighed, r"model.feed_forward must have weights by name in Unweighed.losses; got \('z',\)"),
        (torch.nn.Identity, "model.feed_forward must be a mixer or a feed-forward layer; got Identity"),
    ],
)
def test_what_a_part_does_not_state_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        small_hybrid("lightning_attention", feed_forward=lambda: part())
