"""Ranks that share out the experts train what one device trains, on every ZeRO stage, with and without shared rows."""

from functools import partial

import pytest
import torch
from distributed import run_ranks
from small_model import ADAM, GENTLE_ADAM, full, make_engine, rate
from torch import nn

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.gated_linear_attention import GatedLinearAttention
from longreach.models.part import named_weights
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.checkpoint.checkpoint import load, load_weights, save
from longreach.trainer.engine import saved_buffers
from longreach.trainer.optimizers.groups import parameter_groups
from longreach.trainer.ranks.exchange import gather_numbers
from longreach.trainer.reported import Reported
from longreach.trainer.zero.experts import check_experts

LENGTH, VOCABULARY, ROWS, STEPS, CLIP = 24, 31, 4, 3, 0.1
LENGTHS = [[7, 12], [24], [1, 2, 20], [12, 12]]  # rows 0 and 2 end in padding
EXPERTS = {
    "experts": 4, "experts_per_token": 2, "shared_hidden": 6, "balance": 0.3, "z": 0.05, "bias_rate": 0.01,
    "bias": True, "router_bias": True,
}  # fmt: skip


def make_model(checkpointing="none", std=0.12):
    return LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=2,
        pattern=["gla"],
        mixers={"gla": partial(GatedLinearAttention, heads=2)},
        feed_forward=partial(MixtureOfExperts, hidden=5, **EXPERTS),  # odd: parts of replicas are not of one size
        activation_checkpointing=checkpointing,
        initial_std=std,
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets[0, LENGTH // 2 :] = targets[2, -1] = -100
    return tokens, targets


def step_of(engine, step, mesh, factor=1.0):
    """One step of one row per micro-batch; the norm of the gradient."""
    tokens, targets = batch(step)
    rows = range(mesh.data_rank, ROWS, mesh.data_ranks)
    documents = {row: Documents.from_lengths(LENGTHS[row : row + 1], LENGTH) for row in rows}
    with torch.device("meta"):
        model = make_model()
    counts = [
        model.loss_counts(each) if mesh.sequence_rank == 0 else [0] * len(model.losses) for each in documents.values()
    ]
    totals = gather_numbers(torch.tensor(counts).sum(0).tolist(), mesh).sum(0).tolist()
    reported, layout = Reported(model.losses, totals, mesh), Layout(LENGTH, mesh.sequence_ranks, 2)
    for row in rows:
        seq = Sequence.shared(documents[row], layout, mesh, Strategy())
        loss, _, reports = engine(seq.shard(tokens[row : row + 1]), seq, seq.shard(targets[row : row + 1]), False, True)
        engine.backward(factor * loss, int((targets != -100).sum()), reported.add(reports))
    norm = engine.step(rate(step))
    reported.exchange()
    if engine.stepped:
        engine.module.update(reported.sums())
    return float(norm)


def train(rank, world, sequence, experts, stages, dtype="float32", checkpointing="none", folder=None, std=0.12):
    """Norms, parameters and buffers after some steps, by stage."""
    results = []
    for stage in stages:
        mesh = Mesh.create(sequence, experts=experts)
        chosen = GENTLE_ADAM if dtype == "float32" else ADAM
        build = lambda: make_model(checkpointing, std)  # noqa: E731
        engine = make_engine(stage, model=build, dtype=dtype, clip=CLIP, mesh=mesh, optimizer=chosen)
        norms = [step_of(engine, step, mesh) for step in range(STEPS)]
        buffers = {name: buffer.clone() for name, buffer in engine.named_buffers()}
        results.append((norms, full(engine), buffers))
        if folder is not None:
            save(engine, folder, {"step": STEPS}, keep=1)
    return results


def reference(std=0.12):
    """The same by torch alone, on the whole batch at once, in float64."""
    model = make_model(std=std)
    model.initialise(0)
    model.double()
    chosen = GENTLE_ADAM
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen.weight_decay), betas=chosen.betas, eps=chosen.eps)
    documents, norms, count = Documents.from_lengths(LENGTHS, LENGTH), [], sum(map(sum, LENGTHS))
    for step in range(STEPS):
        tokens, targets = batch(step)
        loss, targeted, reports = model(tokens, Sequence.single(documents), targets, False, True)
        auxiliary = {path: reports[path] / count for path in model.losses}
        (loss / targeted + sum(model.losses[path] * value for path, value in auxiliary.items())).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        model.update({path: reports[path].detach().double() for path in model.sums})
    model.float()
    return norms, {name: p.detach() for name, p in model.named_parameters()}, saved_buffers(model)


def check(results):
    norms, parameters, buffers = reference()
    assert min(norms) > CLIP
    assert all(buffers[f"blocks.{layer}.feed_forward.router.bias"].any() for layer in range(2))
    for of_rank in results:
        for got_norms, masters, got_buffers in of_rank:
            torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
            assert list(masters) == list(parameters)
            for name, value in parameters.items():
                torch.testing.assert_close(masters[name], value, rtol=1e-4, atol=1e-4)
            for name, value in buffers.items():
                torch.testing.assert_close(got_buffers[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "sequence", "experts", "stages"),
    [
        (2, 2, 2, (0, 1, 2, 3)),
        (4, 2, 2, (1, 3)),
        *(
            pytest.param(*sizes, marks=pytest.mark.many)
            for sizes in [(2, 1, 2, (0, 1, 2, 3)), (4, 2, 4, (0, 1, 2, 3)), (4, 2, 2, (0, 2)), (4, 1, 2, (0, 1, 2, 3))]
        ),
    ],
)
def test_equal_one_device(world, sequence, experts, stages):
    check(run_ranks(world, train, sequence, experts, stages, "float32", "mixing" if sequence == 2 else "full"))


@pytest.mark.slow
def test_bfloat16_gives_equal_norms_on_every_stage():
    runs = run_ranks(2, train, 1, 2, (1, 2, 3), "bfloat16", "none", None, 0.05)[0]
    whole = run_ranks(2, train, 1, 1, (1,), "bfloat16", "none", None, 0.05)[0]
    for norms, masters, _ in runs:
        torch.testing.assert_close(norms[0], whole[0][0][0], rtol=5e-3, atol=0)
        torch.testing.assert_close(norms, runs[0][0], rtol=1e-4, atol=0)
        for name, value in masters.items():
            torch.testing.assert_close(value, runs[0][1][name], rtol=1e-4, atol=1e-4)


def load_elsewhere(rank, world, experts, stage, folder):
    engine = make_engine(stage, model=make_model, seed=9, mesh=Mesh.create(experts=experts))
    load(engine, folder)
    visible = {}
    for name, parameter in engine.named_parameters():
        with engine.gather([parameter]):
            visible[name] = parameter.detach().clone()
    return [full(engine, kind) for kind in ("parameter", "exp_avg", "exp_avg_sq")], visible


@pytest.mark.slow
def test_checkpoints_hold_whole_experts(tmp_path):
    saved = run_ranks(2, train, 1, 2, (1,), "float32", "none", str(tmp_path))[0][0][1]
    (folder,) = tmp_path.glob("step*")
    model = make_model()
    load_weights(folder, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    alone = run_ranks(1, load_elsewhere, 1, 0, str(folder))[0]
    for states, visible in (*run_ranks(2, load_elsewhere, 2, 3, str(folder)), alone):
        for got, wanted in zip(states, alone[0], strict=True):
            assert all(torch.equal(got[name], value) for name, value in wanted.items())
        assert all(torch.equal(visible[name], value) for name, value in saved.items())


def step_on_nan(rank, world, stage):
    mesh = Mesh.create(experts=2)
    engine = make_engine(stage, model=make_model, clip=CLIP, mesh=mesh)
    step_of(engine, 0, mesh)
    before = full(engine)
    norm = step_of(engine, 1, mesh, float("nan") if rank == 0 else 1.0)
    unchanged = all(torch.equal(value, before[name]) for name, value in full(engine).items())
    return norm, engine.stepped, unchanged, step_of(engine, 2, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.many), 3])
def test_a_gradient_that_is_not_finite_steps_nothing(stage):
    for norm, stepped, unchanged, later in run_ranks(2, step_on_nan, stage):
        assert norm == float("inf")
        assert not stepped
        assert unchanged
        assert 0 < later < float("inf")


@pytest.mark.parametrize(
    ("ranks", "experts", "said"),
    [
        (3, EXPERTS, "parallel.experts must divide feed_forward.experts, 4; got 3"),
        (2, None, "parallel.experts must be 1 for a model without experts; got 2"),
    ],
)
def test_ranks_that_cannot_share_the_experts_are_refused(ranks, experts, said):
    model = make_model() if experts else nn.Linear(2, 2)
    check_experts(model, 2 if experts else 1)
    with pytest.raises(ValueError, match=said):
        check_experts(model, ranks)
    assert [name for name, _ in named_weights(model)] == [name for name, _ in model.named_parameters()]
