"""A hybrid language model under the engine: sequence ranks in the one data-parallel group, recomputation, ZeRO-3."""

from functools import partial

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, GENTLE_ADAM, full, make_engine, rate

from longreach.kernels.documents import Documents
from longreach.models.activations.recomputation import MODES
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.gated_linear_attention import GatedLinearAttention
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.part import cast_parameters
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.trainer.checkpoint.checkpoint import load, load_weights, save
from longreach.trainer.optimizers.groups import parameter_groups

pytestmark = pytest.mark.slow  # engines on several ranks: a minute together

LENGTH, VOCABULARY, ROWS, STEPS, CLIP = 24, 31, 4, 3, 0.1
LENGTHS = [[7, 17], [24], [1, 2, 21], [12, 12]]


def make_model(tied=True, checkpointing="none", std=0.12):
    """With tied embeddings, and feed-forward layers that share weights; or with neither."""
    return LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=4,
        pattern=["lightning", "gla", "softmax", "latent"],
        mixers={
            "lightning": partial(LightningAttention, heads=2),
            "gla": partial(GatedLinearAttention, heads=2),
            "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2, qk_norm="head"),
            "latent": partial(LatentAttention, heads=2, latent_rank=6, query_rank=5, rope_dim=4),
        },
        feed_forward=partial(SwiGLU, hidden=20),
        tied_embeddings=tied,
        # Gradients of two uses of x: the sum of more, in bfloat16, depends on an order that stages change.
        shared={"feed_forward": ["down"]} if tied else None,
        adapter_rank=2 if tied else None,
        activation_checkpointing=checkpointing,
        initial_std=std,
    )


def batch(step):
    """Tokens and targets [ROWS, LENGTH]; the second half of row 0 has no target: a rank of its own without any."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets[0, LENGTH // 2 :] = -100
    return tokens, targets


def train(rank, world, sequence, spans, stage, dtype, tied, checkpointing, folder=None, steps=STEPS, std=0.12):
    # Else DeepSpeed splits no parameter as small as these.
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    chosen = GENTLE_ADAM if dtype == "float32" else ADAM
    build = lambda: make_model(tied, checkpointing, std)  # noqa: E731
    engine = make_engine(stage, model=build, dtype=dtype, clip=CLIP, config=config, optimizer=chosen)
    mesh = Mesh.create(sequence)
    layout = Layout(LENGTH, sequence, spans)
    norms, losses = [], []
    for step in range(steps):
        tokens, targets = batch(step)
        normaliser, total = int((targets != -100).sum()), torch.zeros(())
        for row in range(mesh.data_rank, ROWS, mesh.data_ranks):
            documents = Documents.from_lengths(LENGTHS[row : row + 1], LENGTH)
            seq = Sequence(documents, layout, mesh.sequence_rank, mesh.sequence_group)
            loss, _ = engine(seq.shard(tokens[row : row + 1]), seq, seq.shard(targets[row : row + 1]))
            engine.backward(loss, normaliser)
            total += loss.detach() / normaliser
        torch.distributed.all_reduce(total)
        losses.append(total.item())
        norms.append(engine.step(rate(step)))
    if folder is not None:
        save(engine, folder, {"step": steps}, keep=1)
    return losses, norms, full(engine)


def reference(tied, std=0.12):
    """One device in float64: what ranks in float32 are off by is their own rounding alone."""
    model = make_model(tied, std=std)
    model.initialise(0)
    model.double()
    chosen = GENTLE_ADAM
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen.weight_decay), betas=chosen.betas, eps=chosen.eps)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, targets = batch(step)
        seq = Sequence.single(Documents.from_lengths(LENGTHS, LENGTH))
        loss = model(tokens, seq, targets)[0] / (targets != -100).sum()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach().float() for name, p in model.named_parameters()}


def check(results, tied):
    losses, norms, parameters = reference(tied)
    assert min(norms) > CLIP
    for got_losses, got_norms, masters in results:
        torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
        assert masters.keys() == parameters.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(masters[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_stage_3_on_two_sequence_ranks(tied, checkpointing):
    check(run_ranks(2, train, 2, 2, 3, "float32", tied, checkpointing), tied)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_on_two_sequence_ranks(stage):
    check(run_ranks(2, train, 2, 2, stage, "float32", True, "mixing"), True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_data_times_two_sequence_ranks(stage):
    check(run_ranks(4, train, 2, 2, stage, "float32", True, "mixing"), True)


def norm_on_one_device(std):
    """Of the first step's gradients, of rows one by one in bfloat16, as engines take them."""
    model, sums = make_model(True, std=std), {}
    model.initialise(0)
    cast_parameters(model, torch.bfloat16)
    tokens, targets = batch(0)
    for row in range(ROWS):
        model.zero_grad()
        seq = Sequence.single(Documents.from_lengths(LENGTHS[row : row + 1], LENGTH))
        (model(tokens[row : row + 1], seq, targets[row : row + 1])[0] / (targets != -100).sum()).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.double()
    return sum(each.square().sum() for each in sums.values()).sqrt().item()


def test_bfloat16_gives_equal_norms_on_every_stage():
    std = 0.05  # with larger ones roundings change the size of the gradient by up to its own, depending on the seed
    runs = [run_ranks(2, train, 2, 2, stage, "bfloat16", True, "mixing", None, STEPS, std)[0] for stage in (1, 2, 3)]
    losses, norm = reference(True, std)[0], norm_on_one_device(std)
    for got_losses, got_norms, _ in runs:
        torch.testing.assert_close(got_losses, losses, rtol=2e-2, atol=0)
        # Later ones hang on the signs of gradients near zero, which Adam's first steps make large.
        torch.testing.assert_close(got_norms[0], norm, rtol=1e-3, atol=0)
        torch.testing.assert_close(got_norms, runs[0][1], rtol=1e-5, atol=0)


def load_elsewhere(rank, world, path, stage):
    engine = make_engine(stage, model=lambda: make_model(True, "full"), seed=9)
    load(engine, path)
    return full(engine)


def test_its_checkpoint_loads_on_other_ranks_and_without_an_engine(tmp_path):
    _, _, saved = run_ranks(2, train, 2, 1, 3, "bfloat16", True, "mixing", tmp_path, 1)[0]
    path = tmp_path / "step-00000001"
    for values in run_ranks(1, load_elsewhere, path, 0):
        assert all(torch.equal(values[name], value) for name, value in saved.items())
    model = make_model(True)
    load_weights(path, model)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight
