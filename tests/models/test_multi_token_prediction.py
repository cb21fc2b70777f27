"""Multi-token prediction: its definition, documents, ranks, recomputation, and what it leaves alone."""

from functools import partial

import pytest
import torch
from distributed import run_threads
from model_presets import feed_forward, mixer_partial, randomise, tokens
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.block import SandwichBlock
from longreach.models.decoding import next_logits
from longreach.models.language_model import LanguageModel
from longreach.parallel.ahead import ahead
from longreach.parallel.collectives import counting
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence

LENGTH = 48
LENGTHS = [[5, 1, 2, 27], [30, LENGTH - 30]]  # the first row ends in padding
PACKED = Documents.from_lengths(LENGTHS, LENGTH)
WEIGHT = 0.4


def model_of(checkpointing="none", modules=2, **changes):
    settings = {
        "vocabulary": 61, "width": 32, "depth": 2, "pattern": ["mamba2", "softmax_attention"],
        "mixers": {name: mixer_partial(name) for name in ("mamba2", "softmax_attention")},
        "feed_forward": feed_forward(40), "multi_token_prediction": modules, "embedding_multiplier": 1.3,
        "multi_token_prediction_weight": WEIGHT if modules else None, "activation_checkpointing": checkpointing,
    }  # fmt: skip
    model = LanguageModel(**settings | changes).double()
    randomise(model)
    return model


def rows():
    """Tokens and targets of the packed rows. Of the documents that end in the row, one goes on in the next row."""
    inputs = tokens(2, LENGTH)
    targets = inputs.roll(-1, dims=1)
    for row, lengths in enumerate(LENGTHS):
        end = 0
        for length in lengths:
            end += length
            targets[row, end - 1] = -100
        targets[row, end:] = -100
    targets[1, -1] = 7  # it is in another row
    targets[1, 3] = -100  # nobody asks for this one
    return inputs, targets


def loss_and_gradients(model, seq):
    inputs, targets = rows()
    loss, _, reports = model(seq.shard(inputs), seq, seq.shard(targets), False, True)
    counts = dict(zip(model.losses, model.loss_counts(PACKED, targets), strict=True))
    total = loss + sum(weight * reports[path] / counts[path] for path, weight in model.losses.items())
    total.backward()
    losses = torch.stack([loss.detach(), *(reports[path].detach() for path in model.losses)])
    return losses, [parameter.grad for parameter in model.parameters()]


def losses_by_document(model):
    """Sums of the modules' losses and their counts, as the paper defines them, one document after the other."""
    inputs, targets = rows()
    sums, counts = [0.0] * 2, [0] * 2
    for row, start, length in ((0, 0, 5), (0, 5, 1), (0, 6, 2), (0, 8, 27), (1, 0, 30), (1, 30, 18)):
        x, wanted = (each[row : row + 1, start : start + length] for each in (inputs, targets))
        hidden = model.hidden(x, Sequence.single(Documents.whole(1, length)))
        for k in (1, 2):
            if length <= k:
                continue
            # Of the token t: h^(k-1)_t, the embedding of t + k, the target of t + k.
            module, seq = model.multi_token_prediction[k - 1], Sequence.single(Documents.whole(1, length - k))
            embedded = 1.3 * model.embedding.weight[x[:, k:]]
            both = torch.cat([module.hidden_norm(hidden[:, :-1]), module.embedding_norm(embedded)], dim=-1)
            hidden = module.norm(module.block(both @ module.projection.weight.T, seq))
            logits, ahead = hidden @ model.head.weight.T, wanted[:, k:]
            sums[k - 1] = sums[k - 1] + F.cross_entropy(logits[0], ahead[0], reduction="sum", ignore_index=-100)
            counts[k - 1] += int((ahead != -100).sum())
    return sums, counts


@pytest.mark.parametrize("block", [None, SandwichBlock])
def test_modules_predict_what_comes_further_ahead_in_the_document(block):
    model = model_of(block=block)
    inputs, targets = rows()
    loss, count, reports = model(inputs, Sequence.single(PACKED), targets, False, True)
    names = [f"multi_token_prediction.{k}.multi_token_prediction_{k + 1}" for k in (0, 1)]
    assert model.losses == dict.fromkeys(names, WEIGHT / 2)
    sums, counts = losses_by_document(model)
    assert model.loss_counts(PACKED, targets) == counts
    gradients = [
        torch.autograd.grad(sum(of), model.parameters(), allow_unused=True) for of in (list(reports.values()), sums)
    ]
    assert not any(gradient is None for gradient in gradients[0][:3])  # embedding, projections: all that is shared
    torch.testing.assert_close([reports[name] for name in names], sums, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)
    plain = model_of(modules=0, block=block)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "multi" not in k})
    alone, number = plain(inputs, Sequence.single(PACKED), targets)
    assert torch.equal(loss, alone)
    assert count == number


@pytest.mark.parametrize("checkpointing", ["full", "mixing"])
def test_recomputation_changes_no_gradient(checkpointing):
    seq = Sequence.single(PACKED)
    found, expected = (loss_and_gradients(model_of(setting), seq) for setting in (checkpointing, "none"))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def on_one_of(rank, world, spans, checkpointing):
    seq = Sequence(PACKED, Layout(LENGTH, world, spans), rank, Mesh.create(world).sequence_group)
    losses, gradients = loss_and_gradients(model_of(checkpointing), seq)
    return losses.numpy(), [gradient.numpy() for gradient in gradients]


@pytest.mark.parametrize(("world", "spans", "checkpointing"), [(2, 1, "mixing"), (3, 2, "full"), (4, 2, "none")])
def test_ranks_that_share_rows_give_what_one_gives(world, spans, checkpointing):
    results = run_threads(world, on_one_of, spans, checkpointing)
    losses, gradients = loss_and_gradients(model_of(), Sequence.single(PACKED))
    torch.testing.assert_close(sum(torch.from_numpy(of) for of, _ in results), losses, atol=1e-9, rtol=1e-9)
    for index, expected in enumerate(gradients):
        total = sum(torch.from_numpy(local[index]) for _, local in results)
        torch.testing.assert_close(total, expected, atol=1e-9, rtol=1e-9)


def shifted(rank, world, spans, most):
    seq = Sequence(PACKED, Layout(LENGTH, world, spans), rank, Mesh.create(world).sequence_group)
    with counting() as sent:
        found = [each.numpy() for each in ahead(seq.shard(numbered()), seq, most, -1)]
    assert dict(sent) == {"gather": (world - 1) * spans * 2 * min(most, LENGTH // (world * spans)) * 16}
    return found


def numbered():
    """`[2, LENGTH, 2]`: the numbers of rows and places."""
    return torch.stack([torch.arange(2)[:, None].expand(2, LENGTH), torch.arange(LENGTH).expand(2, -1)], dim=-1)


@pytest.mark.parametrize(("world", "spans", "most"), [(1, 1, 3), (2, 2, 2), (4, 6, 5), (3, 16, 4)])
def test_what_is_ahead_is_of_the_same_document(world, spans, most):
    """With spans shorter than what is asked for, too."""
    single, layout = Sequence.single(PACKED), Layout(LENGTH, world, spans)
    if world == 1:
        found = ahead(numbered(), single, most, -1)
    else:
        parts = run_threads(world, shifted, spans, most)
        found = [layout.unshard([torch.from_numpy(part[n]) for part in parts]) for n in range(most)]
    ids = PACKED.ids()
    for n, values in enumerate(found, 1):
        for row in range(2):
            for place in range(LENGTH):
                there = place + n < LENGTH and ids[row, place] == ids[row, min(place + n, LENGTH - 1)] >= 0
                assert values[row, place].tolist() == ([row, place + n] if there else [-1, -1])


@torch.no_grad()
def test_decoding_and_evaluation_do_without_the_modules():
    model, cache = model_of(), DecodingCache()
    inputs = tokens(2, 12)
    expected = model(inputs, Sequence.single(Documents.whole(2, 12)))
    for module in model.multi_token_prediction:
        module.forward = None  # nobody may call it
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits = next_logits(model, inputs[:, start:stop], cache)
        torch.testing.assert_close(logits, expected[:, stop - 1], atol=1e-9, rtol=1e-9)
    model(inputs, Sequence.single(Documents.whole(2, 12)), inputs, True)


def test_work_of_the_modules_is_counted():
    module = model_of(modules=0).flops(PACKED)
    one, two = (model_of(modules=number).flops(PACKED) - module for number in (1, 2))
    places = 2 * LENGTH
    block = model_of().blocks[1].flops(Sequence.single(PACKED))
    assert one == block + 2 * places * 32 * (64 + 61)
    assert two == 2 * one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": -1}, "model.multi_token_prediction must not be negative; got -1"),
        (
            {"modules": 0, "multi_token_prediction_weight": 0.3},
            "multi_token_prediction_weight must be null without modules; got 0.3",
        ),
        ({"multi_token_prediction_weight": 0.0}, "multi_token_prediction_weight must be positive; got 0.0"),
        (
            {"pattern": ["rwkv7"], "mixers": {"rwkv7": partial(mixer_partial("rwkv7"))}},
            "multi_token_prediction must repeat a last layer that reads nothing of earlier ones; got one that reads",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model_of(**changes)
