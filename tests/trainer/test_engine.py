"""The engine against AdamW in one process: gradients by their norms and parameters after some steps, on every stage."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from distributed import RankError, run_ranks
from small_model import ADAM, SmallModel, batch, full, make_engine, rate, train_step

from longreach.trainer.engine import norms as norms_of_parts
from longreach.trainer.optimizers.groups import frozen_parameters, parameter_groups
from longreach.trainer.ranks import processes

pytestmark = pytest.mark.slow  # engines on several ranks
STEPS = 4
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
PARAMETERS_OFFLOADED = {"zero_optimization": {"offload_param": {"device": "cpu"}}}


def train(rank, world, stage, accumulation, clip, dtype, config, recompute):
    engine = make_engine(stage, model=lambda: SmallModel(recompute=recompute), clip=clip, dtype=dtype, config=config)
    norms = [train_step(engine, step, rank, world, accumulation) for step in range(STEPS)]
    visible = {}
    for name, parameter in engine.named_parameters():
        with engine.gather([parameter]):
            visible[name] = parameter.detach().clone()
    return norms, full(engine), visible, engine.module.factor


def reference(clip):
    model = SmallModel()
    model.initialise(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, ADAM.weight_decay), betas=ADAM.betas, eps=ADAM.eps)
    norms = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        (model(tokens, targets) / (targets != -100).sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def check(results, clip, tolerance, visible_tolerance):
    norms, parameters = reference(clip)
    for got_norms, masters, visible, _ in results:
        torch.testing.assert_close(got_norms, norms, rtol=tolerance, atol=0)
        for name, value in parameters.items():
            torch.testing.assert_close(masters[name], value, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(visible[name].float(), value, rtol=visible_tolerance, atol=visible_tolerance)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_equals_one_process(stage, world):
    clip = 0.2  # below every norm of the reference
    assert min(reference(0.0)[0]) > clip
    for accumulation, this_clip, recompute in [(1, 0.0, False), (2, clip, False), (2, clip, True)]:
        results = run_ranks(world, train, stage, accumulation, this_clip, "float32", {}, recompute)
        check(results, this_clip, 1e-5, 1e-5)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_bfloat16_keeps_float32_masters_and_equal_norms_on_every_stage(stage):
    results = run_ranks(2, train, stage, 2, 0.2, "bfloat16", {}, False)
    check(results, 0.2, 3e-2, 3e-2)
    norms, masters, visible, factor = results[0]
    assert factor.dtype == torch.float32
    assert factor == torch.tensor(1 / 3)
    others = run_ranks(2, train, 1 + stage % 3, 2, 0.2, "bfloat16", {}, False)[0]
    torch.testing.assert_close(norms, others[0], rtol=1e-4, atol=0)
    for name, value in masters.items():
        assert visible[name].dtype == (torch.float32 if name.endswith(".gain") else torch.bfloat16)
        assert torch.equal(visible[name], value.to(visible[name].dtype))
        torch.testing.assert_close(value, others[1][name], rtol=1e-4, atol=1e-4)
    assert any((value.bfloat16().float() != value).any() for value in masters.values())


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_offloaded_optimizer_states(stage):
    check(run_ranks(2, train, stage, 2, 0.2, "float32", OFFLOADED, False), 0.2, 1e-5, 1e-5)


def gradients_of_gains(rank, world, stage, config):
    """The gradient of what stays in float32, over two micro-batches of each rank."""
    engine = make_engine(stage, dtype="bfloat16", config=config)
    train_step(engine, 0, rank, world, 2)
    moments = full(engine, "exp_avg")
    return torch.cat([value for name, value in moments.items() if name.endswith(".gain")]) / (1 - ADAM.betas[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_float32_parameters_are_not_rounded(world):
    every = [
        run_ranks(world, gradients_of_gains, stage, config)[0]
        for stage, config in [*((stage, {}) for stage in (1, 2, 3)), (3, OFFLOADED), (3, PARAMETERS_OFFLOADED)]
    ]
    for other in every:
        torch.testing.assert_close(other, every[0], rtol=1e-5, atol=1e-7)
    assert (every[0].bfloat16().float() - every[0]).abs().max() > 1e-4 * every[0].abs().max()


@pytest.mark.parametrize(
    ("stage", "config"), [(1, "OFFLOADED"), (2, "OFFLOADED"), (3, "OFFLOADED"), (3, "PARAMETERS_OFFLOADED")]
)
def test_offloading_keeps_two_types(stage, config):
    norms, masters, visible, _ = run_ranks(2, train, stage, 2, 0.2, "bfloat16", globals()[config], False)[0]
    plain = run_ranks(2, train, 3, 2, 0.2, "bfloat16", {}, False)[0]
    torch.testing.assert_close(norms, plain[0], rtol=1e-2, atol=0)
    for name, value in masters.items():
        assert torch.equal(visible[name], value.to(visible[name].dtype)), name
        assert visible[name].dtype == plain[2][name].dtype


def step_on_nan(rank, world, stage, dtype):
    engine = make_engine(stage, dtype=dtype, clip=1.0)
    train_step(engine, 0, rank, world, 1)
    before = full(engine)
    tokens, targets = batch(1)
    engine.backward(engine(tokens, targets) * (float("nan") if rank == 0 else 1.0), 7)
    norm = engine.step(0.1)
    unchanged = all(torch.equal(value, before[name]) for name, value in full(engine).items())
    return norm, unchanged, train_step(engine, 2, rank, world, 1)


EVERY_KIND = [
    *(pytest.param(stage, dtype, marks=pytest.mark.slow) for stage in (1, 2) for dtype in ("float32", "bfloat16")),
    *((0, "float32"), (3, "float32"), (3, "bfloat16")),
]


@pytest.mark.parametrize(("stage", "dtype"), EVERY_KIND)
def test_a_gradient_that_is_not_finite_steps_nothing(stage, dtype):
    for norm, unchanged, next_norm in run_ranks(2, step_on_nan, stage, dtype):
        assert norm == float("inf")
        assert unchanged
        assert 0 < next_norm < float("inf")


def norms_of_a_wide_model(rank, world, stage, dtype, clip, config):
    """The engine's norm of a gradient of two million numbers, and the square of what this rank holds of it, clipped."""
    engine = make_engine(
        stage, model=lambda: SmallModel(width=32, vocabulary=65536), dtype=dtype, clip=clip, config=config
    )
    norm = train_step(engine, 0, rank, world, 2)
    held = [engine.fragment(parameter, "exp_avg").values.double() for _, parameter in engine.named_parameters()]
    return norm, float(sum(values.square().sum() for values in held)) / (1 - ADAM.betas[0]) ** 2


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("stage", "dtype", "config"),
    [
        *((stage, "float32", {}) for stage in range(4)),
        *((stage, "bfloat16", {}) for stage in (1, 2, 3)),
        *((stage, "bfloat16", OFFLOADED) for stage in (1, 3)),
    ],
)
def test_the_norm_of_millions_of_numbers_is_right_to_the_sixth_digit_and_clips(stage, dtype, config, world):
    results = run_ranks(world, norms_of_a_wide_model, stage, dtype, 0.0, config)
    held = sum(square for _, square in results) / (world if stage == 0 else 1)
    for norm, _ in results:
        assert norm == pytest.approx(held**0.5, rel=1e-6)
    clip = results[0][0] / 3
    clipped = run_ranks(world, norms_of_a_wide_model, stage, dtype, clip, config)
    assert sum(square for _, square in clipped) / (world if stage == 0 else 1) == pytest.approx(clip**2, rel=2e-6)
    assert clipped[0][0] == pytest.approx(results[0][0], rel=1e-7)


@pytest.mark.parametrize("size", [1.0, 1e25])  # squares of the latter are beyond float32
@pytest.mark.parametrize("length", [5, 2048, 300_000])
def test_norms_of_parts_are_those_of_float64(size, length):
    tensors = [size * torch.randn(length), size * torch.randn(3, 7)]
    expected = torch.cat([x.double().flatten() for x in tensors]).norm()
    assert float(norms_of_parts(tensors).norm()) == pytest.approx(float(expected), rel=1e-7)


def test_norms_of_what_is_not_finite_are_not():
    assert not norms_of_parts([torch.tensor([1.0, float("nan")])]).norm().isfinite()
    assert not norms_of_parts([torch.full((4096,), float("inf"))]).norm().isfinite()


def largest_held(rank, world, stage):
    held = []

    class Watched(SmallModel):
        def initialise(self, seed, write=None, rank=0, ranks=1):
            def watch(parameter, owner):
                held.append(sum(p.numel() for p in self.parameters()))
                return write(parameter, owner)

            super().initialise(seed, watch, rank, ranks)

    make_engine(stage, model=Watched)
    return max(held), sum(p.numel() for p in SmallModel().parameters())


def test_no_rank_holds_a_whole_model_on_stage_3_while_it_is_made():
    for held, total in run_ranks(2, largest_held, 3):
        assert held == 0, total
    for held, total in run_ranks(2, largest_held, 2):
        assert held == total


def initial_values(rank, world, stage, seed):
    return full(make_engine(stage, seed=seed))


def test_initial_values_depend_on_the_seed_alone():
    expected = SmallModel()
    expected.initialise(5)
    for world, stage in [(1, 0), (2, 1), (4, 3)]:
        for values in run_ranks(world, initial_values, stage, 5):
            assert all(torch.equal(values[name], p) for name, p in expected.named_parameters())


def output_of_an_engine(rank, world, stage, dtype):
    processes.start(device="cpu")
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.redirect_stderr(captured):
        engine = make_engine(stage, dtype=dtype)
        train_step(engine, 0, rank, world, 1)
    return captured.getvalue()


@pytest.mark.parametrize(("stage", "dtype"), EVERY_KIND)
def test_deepspeed_is_silent(stage, dtype):
    assert run_ranks(2, output_of_an_engine, stage, dtype) == ["", ""]


def make_with(rank, world, stage, dtype, config):
    make_engine(stage, dtype=dtype, config=config)


@pytest.mark.parametrize(
    ("stage", "dtype", "config", "message"),
    [
        (0, "bfloat16", {}, "engine.zero_stage must be 1, 2 or 3 with trainer.dtype=bfloat16"),
        (4, "float32", {}, "engine.zero_stage must be one of 0, 1, 2, 3; got 4"),
        (1, "float16", {}, "trainer.dtype must be one of float32, bfloat16; got 'float16'"),
        (1, "float32", {"zero_optimization": {"stage": 2}}, "engine.config.zero_optimization.stage must be 1.*got 2"),
        (1, "float32", {"gradient_clipping": 1.0}, "engine.config.gradient_clipping must not be given.*trainer.clip"),
        (1, "float32", {"optimizer": {"type": "Adam"}}, r"engine.config.optimizer must not .*optimizer\.\*"),
        (1, "float32", {"zero_optimisation": {}}, "got zero_optimisation. Did you mean zero_optimization"),
        (1, "float32", {"zero_optimization": {"overlap": True}}, "(?s)engine.config must be what DeepSpeed .*overlap"),
        (1, "bfloat16", {"communication_data_type": "bf16"}, "communication_data_type must be 'fp32'"),
        (
            3,
            "float32",
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "offload_param.device must be cpu",
        ),
    ],
)
def test_settings_that_contradict_are_refused_by_name(stage, dtype, config, message):
    with pytest.raises(RankError, match=message):
        run_ranks(1, make_with, stage, dtype, config)


def test_more_settings_reach_deepspeed():
    config = {"zero_optimization": {"reduce_bucket_size": 50, "stage": 3, "stage3_param_persistence_threshold": 0}}
    check(run_ranks(2, train, 3, 2, 0.2, "float32", config, False), 0.2, 1e-5, 1e-5)


def test_weight_decay_leaves_out_what_has_one_dim_and_what_a_module_names():
    class Part(torch.nn.Module):
        no_weight_decay = ("rates", "inner.weight")

        def __init__(self):
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
            self.rates = torch.nn.Parameter(torch.zeros(2, 2))

    model = torch.nn.Sequential(Part())
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [x is model[0].outer.weight for x in decaying["params"]] == [True]
    assert len(others["params"]) == 4
    Part.no_weight_decay = ("rate",)
    with pytest.raises(AttributeError, match="rate"):
        parameter_groups(model, 0.1)


def train_only(rank, world, stage, only, dtype):
    engine = make_engine(stage, dtype=dtype, optimizer=replace(ADAM, only=only))
    before = {name: value.clone() for name, value in full(engine).items()}
    norms = [float(train_step(engine, step, rank, world, 1)) for step in range(2)]
    return before, full(engine), norms


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (3, "float32")])
def test_of_only_some_layers_the_others_stay_to_the_bit_and_count_for_no_norm(stage, dtype):
    for before, after, norms in run_ranks(2, train_only, stage, ["down", "gain"], dtype):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if {"down", "gain"} & set(name.split("."))}
    (_, _, every), *_ = run_ranks(2, train_only, stage, [], dtype)
    assert 0 < norms[0] < 0.9 * every[0]


def test_layers_to_train_are_named_as_the_model_names_them():
    model = SmallModel()
    assert frozen_parameters(model, []) == []
    assert len(frozen_parameters(model, ["gain"])) == len(list(model.parameters())) - 2
    with pytest.raises(ValueError, match=r"optimizer.only must name layers or parameters of the model; got indexer"):
        frozen_parameters(model, ["gain", "indexer"])
