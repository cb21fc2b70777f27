"""Every tiny model over gloo ranks against itself on one: loss and every parameter's gradient."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from model_presets import MODELS, build_model

from longreach.kernels.documents import Documents
from longreach.models.language_model import CHECKPOINTING, NO_TARGET, LanguageModel
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence

LENGTH, VOCABULARY = 96, 61
DOCUMENTS = Documents.from_lengths([[5, 40, 1, 27, 11], [LENGTH]], LENGTH)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets; the whole second half of the first row has no target, so that some ranks have few or none."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    targets[0, LENGTH // 2 :] = NO_TARGET
    targets[1, : LENGTH // 2] = NO_TARGET
    return tokens, targets


def loss_and_gradients(model: LanguageModel, seq: Sequence) -> tuple[float, int, dict[str, torch.Tensor]]:
    tokens, targets = batch()
    model.zero_grad()
    loss, count = model(seq.shard(tokens), seq, seq.shard(targets))
    loss.backward()
    return loss.item(), int(count), {name: p.grad for name, p in model.named_parameters()}


def agree_with_one_rank(rank: int, world: int, name: str, spans: int, checkpointing: str) -> None:
    model = build_model(name, vocabulary=VOCABULARY, width=48, initial_std=0.2).double()
    model.initialise(0)
    expected_loss, expected_count, expected = loss_and_gradients(model, Sequence.single(DOCUMENTS))
    model.activation_checkpointing = checkpointing
    seq = Sequence(DOCUMENTS, Layout(LENGTH, world, spans), rank, dist.group.WORLD)
    loss, count, gradients = loss_and_gradients(model, seq)
    totals = torch.tensor([loss, count], dtype=torch.float64)
    dist.all_reduce(totals)
    assert abs(totals[0].item() - expected_loss) <= 1e-9 * abs(expected_loss)
    assert totals[1].item() == expected_count
    for parameter, gradient in gradients.items():
        dist.all_reduce(gradient)
        scale = expected[parameter].abs().max().item()
        assert scale > 0, parameter
        worst = (gradient - expected[parameter]).abs().max().item()
        assert worst <= 1e-9 * max(1.0, scale), f"{parameter}: {worst:.1e} of {scale:.1e}"


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("_tiny")])
def test_two_ranks_give_what_one_gives(name: str, checkpointing: str) -> None:
    run_ranks(2, agree_with_one_rank, name, 4, checkpointing)


@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_of_one_span_give_what_one_gives(world: int) -> None:
    run_ranks(world, agree_with_one_rank, "quickstart", 1, "mixing")
