"""Auxiliary losses and buffers in training: the same on any ranks and ZeRO stage, and kept in checkpoints.

The model has a module of multi-token prediction, which shares its embedding and head and reports a loss too.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from distributed import run_ranks
from routed import Routed
from small_model import ADAM, full, make_engine, rate

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.gated_linear_attention import GatedLinearAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.indexed_attention import MiniMaxSparseAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.checkpoint.checkpoint import CheckpointError, load, load_weights, save
from longreach.trainer.engine import saved_buffers
from longreach.trainer.optimizers.groups import parameter_groups
from longreach.trainer.ranks.exchange import gather_numbers
from longreach.trainer.reported import Reported

LENGTH, VOCABULARY, ROWS, STEPS = 24, 31, 4, 3
NAMES = ("z", "balance", "multi_token_prediction_1")
LENGTHS = [[7, 12], [24], [1, 2, 20], [12, 12]]  # rows 0 and 2 end in padding


def make_model(checkpointing="none"):
    return LanguageModel(
        vocabulary=VOCABULARY,
        width=16,
        depth=2,
        pattern=["gla"],
        mixers={"gla": partial(GatedLinearAttention, heads=2)},
        feed_forward=partial(Routed, hidden=10),
        activation_checkpointing=checkpointing,
        initial_std=0.3,
        tied_embeddings=True,
        multi_token_prediction=1,
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets[0, LENGTH // 2 :] = targets[2, -1] = -100
    return tokens, targets


def step_of(engine, step, layout, mesh):
    """One step of one row per micro-batch; the auxiliary losses."""
    tokens, targets = batch(step)
    rows = range(mesh.data_rank, ROWS, mesh.data_ranks)
    documents = {row: Documents.from_lengths(LENGTHS[row : row + 1], LENGTH) for row in rows}
    model = make_model()
    counts = [
        model.loss_counts(each, targets[row : row + 1]) if mesh.sequence_rank == 0 else [0] * len(model.losses)
        for row, each in documents.items()
    ]
    totals = gather_numbers(torch.tensor(counts).sum(0).tolist(), mesh).sum(0).tolist()
    reported = Reported(model.losses, totals, mesh)
    for row in rows:
        seq = Sequence(documents[row], layout, mesh.sequence_rank, mesh.sequence_group)
        loss, _, reports = engine(seq.shard(tokens[row : row + 1]), seq, seq.shard(targets[row : row + 1]), False, True)
        engine.backward(loss, int((targets != -100).sum()), reported.add(reports))
    engine.step(rate(step))
    reported.exchange()
    engine.module.update(reported.sums())
    return {name: float(value) for name, value in reported.losses().items()}


def train(rank, world, sequence, stage, checkpointing, dtype="float32", resume=None, folder=None, steps=STEPS):
    engine = make_engine(stage, model=lambda: make_model(checkpointing), dtype=dtype)
    mesh, layout, first = Mesh.create(sequence), Layout(LENGTH, sequence, 2), 0
    if resume is not None:
        first = load(engine, resume)["step"]
    losses = [step_of(engine, step, layout, mesh) for step in range(first, steps)]
    if folder is not None:
        save(engine, folder, {"step": steps}, keep=1)
    buffers = {name: buffer.clone() for name, buffer in engine.named_buffers()}
    return losses, full(engine), buffers


def reference():
    """The same by torch alone, on the whole batch at once."""
    model = make_model()
    model.initialise(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, ADAM.weight_decay), betas=ADAM.betas, eps=ADAM.eps)
    documents, losses = Documents.from_lengths(LENGTHS, LENGTH), []
    for step in range(STEPS):
        tokens, targets = batch(step)
        loss, targeted, reports = model(tokens, Sequence.single(documents), targets, False, True)
        counts = dict(zip(model.losses, model.loss_counts(documents, targets), strict=True))
        auxiliary = {path: reports[path] / counts[path] for path in model.losses}
        (loss / targeted + sum(model.losses[path] * value for path, value in auxiliary.items())).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        model.update({path: reports[path].detach().double() for path in model.sums})
        by_name = {name: [v.item() for path, v in auxiliary.items() if path.endswith(f".{name}")] for name in NAMES}
        losses.append({name: sum(values) / len(values) for name, values in by_name.items()})
    return losses, {name: p.detach() for name, p in model.named_parameters()}, saved_buffers(model)


def check(results):
    expected = reference()
    assert expected[2]["blocks.0.feed_forward.bias"].any()
    for losses, parameters, buffers in results:
        for got, wanted in zip(losses, expected[0], strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)
        torch.testing.assert_close(parameters, expected[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(buffers, expected[2], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(buffers[name], results[0][2][name]) for name in buffers)


@pytest.mark.slow
def test_one_rank_in_micro_batches():
    check(run_ranks(1, train, 1, 0, "none"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("sequence", "checkpointing"), [(2, "full"), (2, "mixing"), (1, "full")])
def test_two_ranks_at_every_stage(stage, sequence, checkpointing):
    check(run_ranks(2, train, sequence, stage, checkpointing))


@pytest.mark.slow
def test_two_data_times_two_sequence_ranks():
    check(run_ranks(4, train, 2, 2, "mixing"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_a_run_goes_on_bitwise_with_its_buffers(tmp_path, stage, dtype):
    whole = run_ranks(2, train, 2, stage, "full", dtype)
    run_ranks(2, train, 2, stage, "full", dtype, None, tmp_path, 2)
    resumed = run_ranks(2, train, 2, stage, "full", dtype, tmp_path / "step-00000002")
    for (losses, *expected), (later, *found) in zip(whole, resumed, strict=True):
        assert later == losses[2:]
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_buffers_load_at_another_topology_and_without_an_engine(tmp_path):
    _, _, saved = run_ranks(2, train, 2, 3, "none", "float32", None, tmp_path, 2)[0]
    path = tmp_path / "step-00000002"
    check(
        [
            (reference()[0][:2] + losses, parameters, buffers)
            for losses, parameters, buffers in run_ranks(1, train, 1, 0, "none", "float32", path)
        ]
    )
    model = make_model()
    load_weights(path, model)
    assert saved["blocks.1.feed_forward.average"].any()
    assert all(torch.equal(buffer, saved[name]) for name, buffer in saved_buffers(model).items())


def on_one_rank(rank, world, action):
    return action()


def evaluated():
    engine = make_engine(1, model=make_model)
    before = {name: buffer.clone() for name, buffer in engine.named_buffers()}
    tokens, targets = batch(0)
    with torch.no_grad():
        loss, _, _ = engine(tokens, Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)), targets, True)
    alone = engine.module(tokens, Sequence.single(Documents.from_lengths(LENGTHS, LENGTH)), targets)[0]
    return (
        float(loss) == pytest.approx(float(alone)),
        all(torch.equal(buffer, before[name]) for name, buffer in engine.named_buffers()),
    )


@pytest.mark.slow
def test_evaluation_sees_the_token_loss_and_changes_no_buffer():
    assert run_ranks(1, on_one_rank, evaluated) == [(True, True)]


def test_a_buffer_that_a_checkpoint_cannot_hold_is_refused():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("table", torch.zeros(2, dtype=torch.float64), persistent=False)
    assert not saved_buffers(module)
    module.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    with pytest.raises(ValueError, match="buffers must be float32 to be in checkpoints; got steps in int64"):
        saved_buffers(module)


def sparse_model(mixer, **more):
    sizes = {"heads": 2, "kv_heads": 1, "conv_size": 2, **more}
    return LanguageModel(
        vocabulary=VOCABULARY, width=16, depth=2, pattern=["it"], mixers={"it": partial(mixer, **sizes)},
        feed_forward=partial(SwiGLU, hidden=10), initial_std=0.3,
    )  # fmt: skip


def save_dense(rank, world, path):
    engine = make_engine(0, model=lambda: sparse_model(SoftmaxAttention), dtype="float32")
    save(engine, path, {"step": 0}, keep=1)
    return full(engine)


@pytest.mark.slow
def test_an_indexer_joins_the_weights_of_full_attention(tmp_path):
    (dense,) = run_ranks(1, save_dense, tmp_path)
    (path,) = tmp_path.iterdir()
    model = sparse_model(MiniMaxSparseAttention, block_size=4, count=2, index_dim=4)
    with pytest.raises(CheckpointError, match=r"indexer.\S+ is missing"):
        load_weights(path, model)
    load_weights(path, model, seed=5)
    fresh = sparse_model(MiniMaxSparseAttention, block_size=4, count=2, index_dim=4)
    fresh.initialise(5)
    for name, parameter in model.named_parameters():
        expected = dict(fresh.named_parameters())[name] if "indexer" in name else dense[name]
        assert torch.equal(parameter, expected), name
    with pytest.raises(CheckpointError, match=r"output.bias is missing"):
        load_weights(path, sparse_model(partial(SoftmaxAttention, output_bias=True)), seed=5)


def step_of_indexer(rank, world, sequence, stage):
    """Each parameter's move in one step in which the indexer alone trains, and the step's losses."""
    documents = Documents.from_lengths(LENGTHS, LENGTH)
    engine = make_engine(
        stage, model=lambda: sparse_model(MiniMaxSparseAttention, block_size=4, count=2, index_dim=4, dense_steps=1),
        optimizer=replace(ADAM, only=["indexer"]),
    )  # fmt: skip
    before = {name: value.clone() for name, value in full(engine).items()}
    mesh, layout, model = Mesh.create(sequence), Layout(LENGTH, sequence, 2), engine.module
    model.at_step(0)
    tokens, targets = batch(0)
    counts = gather_numbers(model.loss_counts(documents) if mesh.rank == 0 else [0, 0], mesh).sum(0).tolist()
    reported = Reported(model.losses, counts, mesh)
    seq = Sequence.shared(documents, layout, mesh, Strategy())
    loss, _, reports = engine(seq.shard(tokens), seq, seq.shard(targets), False, True)
    engine.backward(loss, int((targets != -100).sum()), reported.add(reports))
    engine.step(0.01)
    reported.exchange()
    after = full(engine)
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    return moved, {name: float(value) for name, value in reported.losses().items()}


@pytest.mark.slow
def test_a_warm_up_trains_the_indexer_alone_alike_on_any_ranks_and_stage():
    ((expected, losses),) = run_ranks(1, step_of_indexer, 1, 0)
    assert expected
    assert all(".indexer." in name for name in expected)
    assert losses["index"] > 0.01
    for moved, found in run_ranks(2, step_of_indexer, 2, 3):
        assert found["index"] == pytest.approx(losses["index"], rel=1e-5)
        assert moved.keys() == expected.keys()
        for name, move in expected.items():
            torch.testing.assert_close(moved[name], move, atol=1e-4, rtol=1e-3)
