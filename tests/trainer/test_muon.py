"""Muon against torch's own on one device, and the same on ranks, on every ZeRO stage, with experts and elsewhere."""

from dataclasses import replace

import pytest
import torch
from distributed import RankError, run_ranks
from small_model import ADAM, SmallModel, batch, full, make_engine, rate, train_step
from test_experts_on_ranks import make_model, step_of

from longreach.models.part import named_weights
from longreach.parallel.mesh import Mesh
from longreach.trainer.checkpoint.checkpoint import load, save
from longreach.trainer.optimizers.exchange import Part, assign
from longreach.trainer.optimizers.groups import hidden_matrices, matched, parameter_groups
from longreach.trainer.optimizers.muon import COEFFICIENTS, ITERATIONS, orthogonal
from longreach.trainer.optimizers.settings import OptimizerSettings, Rule

MUON = replace(ADAM, kind="muon")
STEPS, CLIP = 4, 0.2
MATRICES = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("up", "down")}


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 5, 12), (2, 12, 5)])
def test_singular_values_go_through_the_polynomial_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(matrices), u * s.unsqueeze(1) @ v, rtol=1e-9, atol=1e-9)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def optimizers_of_torch(model):
    """torch's Muon, and AdamW for the rest."""
    muons = [p for name, p in model.named_parameters() if name in MATRICES]
    others = [p for name, p in model.named_parameters() if name not in MATRICES]
    decays = [
        {"params": [p for p in others if p.dim() > 1]},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(muons, adjust_lr_fn="match_rms_adamw", weight_decay=ADAM.weight_decay),
        torch.optim.AdamW(decays, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay),
    ]


def reference(monkeypatch):
    """Norms and parameters after some steps, by torch alone; its Muon computes in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # what torch's Muon casts by
    model = SmallModel()
    model.initialise(0)
    optimizers, norms = optimizers_of_torch(model), []
    for step in range(STEPS):
        tokens, targets = batch(step)
        (model(tokens, targets) / (targets != -100).sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def train(rank, world, stages, dtype="float32", config=None, folder=None):
    results = []
    for stage in stages:
        engine = make_engine(stage, clip=CLIP, dtype=dtype, config=config, optimizer=MUON)
        norms = [train_step(engine, step, rank, world, 2) for step in range(STEPS)]
        results.append((norms, full(engine)))
        if folder is not None:
            save(engine, folder, {"step": STEPS}, keep=1)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_equals_the_muon_of_torch(monkeypatch, world):
    norms, parameters = reference(monkeypatch)
    assert min(norms) > CLIP
    for of_rank in run_ranks(world, train, (0, 1, 2, 3)):
        for got_norms, masters in of_rank:
            torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
            for name, value in parameters.items():
                torch.testing.assert_close(masters[name], value, rtol=1e-4, atol=1e-4)


def of_bfloat16(rank, world, stages, config):
    """Norms, float32 values and visible ones after some steps."""
    results = []
    for stage in stages:
        engine = make_engine(stage, clip=CLIP, dtype="bfloat16", config=config, optimizer=MUON)
        norms = [train_step(engine, step, rank, world, 2) for step in range(STEPS)]
        seen = {}
        for name, parameter in engine.named_parameters():
            with engine.gather([parameter]):
                seen[name] = parameter.detach().clone()
        results.append((norms, full(engine), seen))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}])
def test_two_types_and_offloaded_states_on_every_stage(config):
    first, *others = run_ranks(2, of_bfloat16, (1, 2, 3), config)[0]
    norms, parameters = first[:2]
    for got_norms, masters, seen in (first, *others):
        torch.testing.assert_close(got_norms, norms, rtol=1e-3, atol=0)
        for name, value in parameters.items():
            torch.testing.assert_close(masters[name], value, rtol=1e-3, atol=1e-3)
            assert torch.equal(seen[name], masters[name].to(seen[name].dtype)), name


def save_and_go_on(rank, world, folder, stage):
    engine = make_engine(stage, clip=CLIP, optimizer=MUON)
    for step in range(2):
        train_step(engine, step, rank, world, 1)
    save(engine, folder, {"step": 2}, keep=1)
    for step in range(2, 4):
        train_step(engine, step, rank, world, 1)
    return full(engine)


def load_and_go_on(rank, world, folder, stage, optimizer=MUON):
    engine = make_engine(stage, clip=CLIP, seed=7, optimizer=optimizer)
    load(engine, folder)
    for step in range(2, 4):
        train_step(engine, step, rank, world, 1)
    return full(engine), engine.adam_steps


@pytest.mark.slow
def test_a_checkpoint_goes_on_bitwise_and_elsewhere_to_rounding(tmp_path):
    ended = run_ranks(2, save_and_go_on, tmp_path, 1)[0]
    (folder,) = tmp_path.glob("step*")
    for world, stage in [(2, 1), (1, 0), (4, 3), (2, 2)]:
        got, steps = run_ranks(world, load_and_go_on, folder, stage)[0]
        assert steps == 4
        for name, value in ended.items():
            if (world, stage) == (2, 1):
                assert torch.equal(got[name], value), name
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises(RankError, match=r"without exp_avg/layers.0.*Use the optimizer that it was saved with"):
        run_ranks(2, load_and_go_on, folder, 1, ADAM)


def train_experts(rank, world, experts, stage):
    mesh = Mesh.create(experts=experts)
    engine = make_engine(stage, model=make_model, clip=CLIP, mesh=mesh, optimizer=MUON)
    norms = [step_of(engine, step, mesh) for step in range(2)]
    return norms, full(engine)


@pytest.mark.slow
def test_experts_that_ranks_share_out_step_as_on_one_device():
    norms, parameters = run_ranks(1, train_experts, 1, 0)[0]
    for world, experts, stage in [(2, 1, 1), (2, 2, 2), (4, 2, 3), (4, 2, 0)]:  # of 2 experts a rank, 2 replicas
        for got_norms, masters in run_ranks(world, train_experts, experts, stage):
            torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
            for name, value in parameters.items():
                torch.testing.assert_close(masters[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_each_expert_is_a_matrix_of_its_own():
    """The step of one device from the seed, against a loop over experts."""
    before, after, momentum = run_ranks(1, first_step_of_experts)[0]
    name = next(name for name, value in before.items() if value.dim() == 3)
    for expert in range(len(before[name])):
        wanted = before[name][expert] * (1 - 0.01 * ADAM.weight_decay)
        mean = momentum[name][expert] * (0.95 + 1)  # after one step: of 0.05 g, 0.95 * 0.05 g + 0.05 g
        wanted -= 0.01 * 0.2 * max(wanted.shape) ** 0.5 * orthogonal(mean.unsqueeze(0))[0]
        torch.testing.assert_close(after[name][expert], wanted, rtol=1e-4, atol=1e-5)


def first_step_of_experts(rank, world):
    mesh = Mesh.create()
    engine = make_engine(1, model=make_model, mesh=mesh, optimizer=replace(MUON, groups={}))
    before = {name: value.clone() for name, value in full(engine).items()}
    step_of(engine, 1, mesh)
    parameters = dict(engine.named_parameters())
    momentum = {
        name: engine.fragment(parameter, "momentum").values.view(before[name].shape).clone()
        for name, parameter in parameters.items()
        if "momentum" in engine.kinds(parameter)
    }
    return before, full(engine), momentum


def test_muon_steps_the_matrices_of_hidden_layers_alone():
    model = make_model()
    matrices = hidden_matrices(model)
    others = {name for name, p in named_weights(model) if id(p) not in matrices}
    stepped = {name for name, p in named_weights(model) if id(p) in matrices}
    inner = {"mixer.query.weight", "mixer.output.weight", "mixer.decay.up.weight"}
    inner |= {f"feed_forward.{name}.weight" for name in ("experts.up", "experts.down", "shared.gate")}
    assert {name.split(".", 2)[2] for name in stepped if name.startswith("blocks.0")} >= inner
    assert all(p.dim() > 1 for name, p in named_weights(model) if name in stepped)
    assert {"embedding.weight", "head.weight", "blocks.0.feed_forward.router.weight"} <= others
    assert not any("norm" in name or "bias" in name or "conv" in name for name in stepped)
    groups = parameter_groups(model, 0.1, kind="muon")
    assert {group["kind"] for group in groups} == {"adamw", "muon"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_matrix_has_one_owner_and_none_has_much_more_than_its_share(ranks):
    parts = [Part(0, 1, 8, 8, 0, 0, 0)] * 12 + [Part(0, 6, 4, 4, 0, 0, 0)] * 3 + [Part(0, 1, 16, 4, 0, 0, 0)]
    units = assign(parts, ranks)
    for number, part in enumerate(parts):
        own = sorted((unit.first, unit.last) for unit in units if unit.part == number)
        assert [first for first, _ in own] == [0, *(last for _, last in own[:-1])]
        assert own[-1][1] == part.count * part.rows * part.columns
    loads = [0] * ranks
    for unit in units:
        loads[unit.owner] += (unit.last - unit.first) * min(parts[unit.part].rows, parts[unit.part].columns)
    assert max(loads) - min(loads) <= max(8 * 8 * 8, 6 * 64)


RULES = {"heads": Rule(("*.up.weight",), row_blocks=31), "slow": Rule(("*.down.weight", "*.gain"), 0.5, 0.0)}


def train_by_rules(rank, world, stage):
    groups = {
        "heads": {"match": ["*.up.weight"], "row_blocks": 31},
        "slow": {"match": ["*.down.weight", "*.gain"], "learning_rate_factor": 0.0, "weight_decay": 0.3},
    }
    engine = make_engine(stage, optimizer=replace(MUON, groups=groups))
    before = {name: value.clone() for name, value in full(engine).items()}
    train_step(engine, 0, rank, world, 1)
    return before, full(engine)


@pytest.mark.slow
def test_rules_reach_the_groups_that_they_match():
    ((before, after), *_) = run_ranks(2, train_by_rules, 3)
    for name, value in before.items():
        still = name.endswith(("down.weight", "gain"))
        assert torch.equal(value, after[name]) == still, name
        if name.endswith("up.weight"):  # 31 rows, each of norm 1 / (1 ± 0.3) apart from decay
            moved = after[name] - value * (1 - rate(0) * ADAM.weight_decay)
            norms = moved.norm(dim=1) / (0.2 * 10**0.5 * rate(0))
            assert float(norms.min()) > 0.6
            assert float(norms.max()) < 1.3


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"a": Rule(("*.nothing",))}, r"optimizer.groups.a.match must match parameters of the model; got \*.nothing"),
        ({"a": Rule(("*.up.*",)), "b": Rule(("*.weight",))}, "must match each parameter once; layers.0.up.weight"),
        ({"a": Rule(("*.up.weight",), row_blocks=2)}, "row_blocks must divide the rows of matrices"),
        ({"a": Rule(("*.norm.*",), row_blocks=2)}, "row_blocks must divide the rows of matrices that Muon steps"),
    ],
)
def test_rules_that_fit_no_parameter_are_refused(rules, said):
    assert matched(SmallModel(), RULES)
    with pytest.raises(ValueError, match=said):
        matched(SmallModel(), rules)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "adam"}, "optimizer.kind must be one of adamw, muon, lion; got 'adam'"),
        ({"momentum": 0.9}, "optimizer.momentum must come with optimizer=muon; got 0.9 with adamw"),
        ({"kind": "muon", "momentum": 1.0}, r"optimizer.momentum must lie in \[0, 1\); got 1.0"),
        ({"kind": "lion", "eps": 1e-6}, "optimizer.eps must not be given with optimizer=lion"),
        ({"groups": {"a": {"matches": ["*"]}}}, r"optimizer.groups.a must hold settings of match.*got \['matches'\]"),
        ({"groups": {"a": {"weight_decay": 0.0}}}, "optimizer.groups.a.match must list patterns of names; got None"),
        ({"groups": {"a": {"match": ["*"]}}}, "optimizer.groups.a must change something besides match"),
        ({"groups": {"a": {"match": ["*"], "weight_decay": -1}}}, "a.weight_decay must be a number of at least 0"),
        ({"groups": {"a": {"match": ["*"], "row_blocks": 2}}}, "a.row_blocks must come with optimizer=muon; got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    OptimizerSettings(kind="muon", momentum=0.9, groups={"a": {"match": ["*"], "row_blocks": 2}}).check()
    with pytest.raises(ValueError, match=said):
        OptimizerSettings(**settings).check()


LION = OptimizerSettings(kind="lion", betas=(0.9, 0.99), weight_decay=0.3)


def train_lion(rank, world, stage):
    engine = make_engine(stage, optimizer=LION)
    states = [{name: value.clone() for name, value in full(engine).items()}]
    for step in range(3):
        train_step(engine, step, rank, world, 1)
        states.append({name: value.clone() for name, value in full(engine).items()})
    return states


@pytest.mark.slow
def test_lion_follows_the_signs_of_its_paper():
    model = SmallModel()
    model.initialise(0)
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    got = [run_ranks(2, train_lion, stage)[0] for stage in (0, 1, 3)]
    for step in range(3):
        tokens, targets = batch(step)
        (model(tokens, targets) / (targets != -100).sum()).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                decay = 0.3 if p.dim() > 1 else 0.0
                p -= rate(step) * (torch.sign(0.9 * mean[name] + 0.1 * p.grad) + decay * p)
                mean[name] = 0.99 * mean[name] + 0.01 * p.grad
                p.grad = None
                for states in got:  # a sign of what is nearly 0 may differ by rounding
                    off = (states[step + 1][name] - p).abs() > 1e-5
                    assert off.float().mean() < 0.02, (step, name)
