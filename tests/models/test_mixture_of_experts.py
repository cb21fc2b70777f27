"""Mixtures of experts: transformers' blocks and a loop over tokens, losses, balancing, padding, and ranks."""

from functools import partial

import pytest
import torch
from definitions import definitions_of
from distributed import run_threads
from model_presets import randomise, small_hybrid
from oracles import draw, whole, with_gradients
from steps_on_meta import watched_steps
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.router import Router
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

WIDTH, LENGTH = 16, 24
DEEPSEEK = {
    "score": "sigmoid", "groups": 4, "chosen_groups": 2, "scale": 2.5, "experts": 12, "experts_per_token": 3,
    "shared_hidden": 20, "bias_rate": 0.5,
}  # fmt: skip
KINDS = {
    "mixtral": {"experts": 5},
    "qwen3_moe": {"experts": 7, "experts_per_token": 3, "renormalise": False},
    "deepseek_v3": DEEPSEEK,
    "switch": {"experts": 3, "experts_per_token": 1, "renormalise": False},
    "deepseek_v2": {
        "groups": 3, "chosen_groups": 2, "group_scores": 1, "experts": 6, "renormalise": False, "scale": 16.0,
        "shared_hidden": 8, "shared_gate": True,
    },
    "gpt_oss": {"experts": 5, "router_bias": True, "bias": True, "limit": 0.8},
    "llama4": {
        "experts": 3, "experts_per_token": 1, "score": "sigmoid", "renormalise": False, "weigh_inputs": True,
        "shared_hidden": 10,
    },
    "nemotron_h": {
        **DEEPSEEK, "activation": "squared_relu", "expert_width": 7, "bias": True, "weigh_inputs": True,
    },
}  # fmt: skip
ALL = {**DEEPSEEK, "router_bias": True, "bias": True, "limit": 0.8, "weigh_inputs": True, "shared_gate": True}


def layer(dtype=torch.float64, **settings):
    made = MixtureOfExperts(width=WIDTH, hidden=10, **settings).to(dtype)
    randomise(made)
    with torch.no_grad():
        made.router.bias.copy_(0.1 * draw(made.router.experts, seed=3))
    return made


def close(actual, expected, tolerance=1e-9):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def theirs(kind, made):
    """transformers' block with the same weights, and its parameters in the order of ours."""
    modeling = definitions_of(kind)
    router = made.router
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 10, "moe_intermediate_size": 10, "num_local_experts": router.experts,
        "num_experts": router.experts, "num_experts_per_tok": router.chosen, "hidden_act": "silu",
        "norm_topk_prob": router.renormalise,
    }  # fmt: skip
    if kind == "deepseek_v3":
        sizes |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2}
        sizes |= {"n_routed_experts": router.experts}
    names = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "deepseek_v3": "DeepseekV3"}
    config = getattr(modeling, f"{names[kind]}Config")(**sizes)
    config._experts_implementation = "eager"
    block = {"mixtral": "MixtralSparseMoeBlock", "qwen3_moe": "Qwen3MoeSparseMoeBlock", "deepseek_v3": "DeepseekV3MoE"}
    with torch.no_grad():
        other = getattr(modeling, block[kind])(config).double()
        experts = made.experts
        other.gate.weight.copy_(router.weight)
        router.bias.mul_(kind == "deepseek_v3")  # the others have none
        other.experts.gate_up_proj.copy_(torch.cat([experts.gate.weight, experts.up.weight], 1))
        other.experts.down_proj.copy_(experts.down.weight)
        if kind == "deepseek_v3":
            other.gate.e_score_correction_bias = router.bias.clone()
            for name, own in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
                getattr(other.shared_experts, name).weight.copy_(getattr(made.shared, own).weight)
    return other


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_is_the_block_in_transformers(kind, monkeypatch):
    """In float64, in which their routers compute too here: they say float32."""
    made = layer(**KINDS[kind])
    other = theirs(kind, made)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    x = draw(2, LENGTH, WIDTH)
    ours = [made.router.weight, *(each.weight for each in (made.experts.gate, made.experts.up, made.experts.down))]
    actual = with_gradients(lambda x: made(x, whole(2, LENGTH))[0], x, ours)
    names = [other.gate.weight, other.experts.gate_up_proj, other.experts.down_proj]
    out, dx, drouter, dboth, ddown = with_gradients(other, x, names)
    close(actual, (out, dx, drouter, *dboth.chunk(2, 1), ddown))


def feed_forward(layer, token, expert=...):
    """A SwiGLU, or a layer of two matrices with a squared ReLU, or that of one expert."""

    def linear(each, x):
        return each.weight[expert] @ x + (0 if each.bias is None else each.bias[expert])

    if getattr(layer, "gate", None) is None:
        return linear(layer.down, F.relu(linear(layer.up, token)) ** 2)
    gate, up = linear(layer.gate, token), linear(layer.up, token)
    if layer.limit is None:
        return linear(layer.down, F.silu(gate) * up)
    gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
    return linear(layer.down, (up + 1) * gate * torch.sigmoid(1.702 * gate))


def by_token(made, x):
    """The definition, a token at a time; x `[N, D]`."""
    router, outputs = made.router, []
    for token in x:
        logits = router.weight @ token + (0 if router.logit_bias is None else router.logit_bias)
        scores = logits.softmax(0) if router.score == "softmax" else logits.sigmoid()
        ranked = (scores + router.bias).detach()
        groups = ranked.view(router.groups, -1)
        if router.groups > 1:
            sums = groups.sort(descending=True).values[:, : router.group_scores].sum(1)
            kept = sums.argsort(descending=True)[: router.chosen_groups].tolist()
            allowed = torch.tensor([group in kept for group in range(router.groups)])
            ranked = torch.where(allowed.unsqueeze(1), groups, -torch.inf).flatten()
        experts = ranked.argsort(descending=True)[: router.chosen].tolist()
        total = sum(scores[e] for e in experts) if router.renormalise else 1.0
        read = token if made.narrow is None else made.narrow.weight @ token
        out = torch.zeros_like(read)
        for e in experts:
            weight = router.scale * scores[e] / total
            if made.experts.weigh_inputs:
                out = out + feed_forward(made.experts, weight * read, e)
            else:
                out = out + weight * feed_forward(made.experts, read, e)
        out = out if made.widen is None else made.widen.weight @ out
        if made.shared is not None:
            part = feed_forward(made.shared, token)
            gate = 1.0 if made.shared_gate is None else torch.sigmoid(made.shared_gate.weight[0] @ token)
            out = out + gate * part
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("settings", [*KINDS.values(), ALL], ids=[*KINDS, "all"])
def test_is_a_loop_over_tokens(settings):
    made, x = layer(**settings), draw(2, LENGTH, WIDTH)
    parameters = list(made.parameters())
    actual = with_gradients(lambda x: made(x, whole(2, LENGTH))[0], x, parameters)
    expected = with_gradients(lambda x: by_token(made, x.flatten(0, 1)).view(x.shape), x, parameters)
    close(actual, expected)


def test_llama_4s_layer_is_that_of_transformers(monkeypatch):
    modeling = definitions_of("llama4")
    made, x = layer(**KINDS["llama4"]), draw(2, LENGTH, WIDTH)
    made.router.bias.zero_()  # theirs has none
    config = modeling.Llama4TextConfig(
        hidden_size=WIDTH, intermediate_size=10, num_local_experts=3, num_experts_per_tok=1, num_hidden_layers=1
    )
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    experts, shared, other = made.experts, made.shared, modeling.Llama4TextMoe(config).double()

    def theirs(x):
        replaced = {
            "router.weight": made.router.weight,
            "experts.gate_up_proj": torch.cat([experts.gate.weight, experts.up.weight], 1).transpose(1, 2),
            "experts.down_proj": experts.down.weight.transpose(1, 2),
            **{f"shared_expert.{name}_proj.weight": getattr(shared, name).weight for name in ("gate", "up", "down")},
        }
        return torch.func.functional_call(other, replaced, (x,))[0].view(x.shape)

    parameters = list(made.parameters())
    actual = with_gradients(lambda x: made(x, whole(2, LENGTH))[0], x, parameters)
    close(actual, with_gradients(theirs, x, parameters))


def test_gpt_oss_layer_is_that_of_transformers():
    modeling = definitions_of("gpt_oss")
    made, x = layer(**KINDS["gpt_oss"]), draw(2, LENGTH, WIDTH)
    made.router.bias.zero_()
    config = modeling.GptOssConfig(
        hidden_size=WIDTH, intermediate_size=10, num_local_experts=5, num_experts_per_tok=2, swiglu_limit=0.8
    )
    config._experts_implementation = "eager"
    experts, router, other = made.experts, made.router, modeling.GptOssMLP(config).double()

    def theirs(x):
        gate, up = experts.gate, experts.up  # theirs alternate
        replaced = {
            "router.weight": router.weight, "router.bias": router.logit_bias,
            "experts.gate_up_proj": torch.stack([gate.weight, up.weight], 2).flatten(1, 2).transpose(1, 2),
            "experts.gate_up_proj_bias": torch.stack([gate.bias, up.bias], 2).flatten(1),
            "experts.down_proj": experts.down.weight.transpose(1, 2), "experts.down_proj_bias": experts.down.bias,
        }  # fmt: skip
        return torch.func.functional_call(other, replaced, (x,))[0]

    parameters = list(made.parameters())
    actual = with_gradients(lambda x: made(x, whole(2, LENGTH))[0], x, parameters)
    close(actual, with_gradients(theirs, x, parameters))


def test_padding_goes_nowhere_and_counts_nowhere():
    made = layer(**DEEPSEEK, balance=0.1, z=0.1)
    seq = Sequence.single(Documents.from_lengths([[7, 9]], LENGTH))
    x = draw(1, LENGTH, WIDTH)
    with torch.no_grad():
        out, balance, z, load = made(x, seq)
    changed = x.clone()
    changed[:, 16:] = 100 * draw(1, 8, WIDTH, seed=5)
    with torch.no_grad():
        again = made(changed, seq)
    assert torch.equal(out[:, :16], again[0][:, :16])
    assert [float(value) for value in (balance, z)] == [float(value) for value in again[1:3]]
    assert torch.equal(load, again[3])
    assert load.sum() == 16 * 3
    torch.testing.assert_close(again[0][:, 16:], made.shared(changed, seq)[:, 16:])
    alone = made(x[:, :16], whole(1, 16))
    close((out[:, :16], balance, z), (alone[0], *alone[1:3]))


def test_the_balancing_loss_is_that_of_transformers_once_the_load_is_known(monkeypatch):
    modeling = definitions_of("mixtral")
    made, x, seq = layer(**KINDS["mixtral"], balance=0.1, z=0.1), draw(2, LENGTH, WIDTH), whole(2, LENGTH)
    made.router.bias.zero_()
    _, first, z, load = made(x, seq)
    assert float(first) == pytest.approx(2 * LENGTH)  # even shares: 1 for each token
    made.update({"load": load.double()})
    logits = F.linear(x.flatten(0, 1), made.router.weight)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    expected = modeling.load_balancing_loss_func((logits,), 5, 2) / 2  # theirs is k where the load is even
    balance = made(x, seq)[1] / (2 * LENGTH)
    close(
        (balance, *torch.autograd.grad(balance, made.router.weight)),
        (expected, *torch.autograd.grad(expected, made.router.weight)),
    )
    torch.testing.assert_close(z, logits.logsumexp(-1).square().sum())


def test_the_bias_follows_the_load_and_takes_part_in_the_choice_alone():
    made = layer(torch.float32, experts=4, bias_rate=0.25)
    made.router.bias.zero_()
    made.update({"load": torch.tensor([10.0, 2.0, 4.0, 0.0], dtype=torch.float64)})
    assert made.router.bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    x = draw(9, WIDTH).float()
    routing = made.router(x)
    scores = F.linear(x, made.router.weight).softmax(-1)
    assert torch.equal(routing.experts, (scores + made.router.bias).topk(2).indices)
    weights = scores.gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, weights / weights.sum(1, keepdim=True))
    assert not made.router.bias.requires_grad


def test_the_router_computes_in_float32():
    made = layer(torch.bfloat16, experts=4)
    x = draw(9, WIDTH).bfloat16()
    routing = made.router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, F.linear(x.float(), made.router.weight.float()))


def test_statistics_of_the_load():
    shown = layer(experts=4).statistics({"load": torch.tensor([6.0, 2.0, 0.0, 0.0], dtype=torch.float64)})
    assert float(shown["busiest_expert"]) == 0.75
    assert float(shown["idlest_expert"]) == 0.0
    assert float(shown["expert_entropy"]) == pytest.approx(0.40563906)
    even = layer(experts=4).statistics({"load": torch.ones(4, dtype=torch.float64)})
    assert float(even["expert_entropy"]) == pytest.approx(1.0)


def test_what_a_token_uses_is_counted():
    made = partial(MixtureOfExperts, hidden=10, experts=6, shared_hidden=4)
    model = small_hybrid("softmax_attention", depth=2, feed_forward=made)
    expert = 3 * model.width * 10
    assert model.parameter_count() - model.parameter_count(active=True) == 2 * 4 * expert
    part, seq = model.layers[0].part("feed_forward"), Sequence.single(Documents.from_lengths([[5, 3]], 10))
    shared, router = 3 * 2 * 10 * model.width * 4, 2 * 10 * model.width * 6
    assert part.flops(seq) == shared + router + 8 * 2 * 2 * expert
    narrow = MixtureOfExperts(width=16, hidden=10, experts=6, activation="squared_relu", expert_width=4)
    assert narrow.idle_parameters() == 4 * 2 * 10 * 4
    assert narrow.flops(seq) == 2 * 10 * 16 * 6 + 2 * 10 * 2 * 16 * 4 + 2 * 8 * 2 * 2 * 10 * 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 0}, "experts_per_token must be between 1 and the 0 of feed_forward.experts; got 2"),
        ({"experts": 4, "experts_per_token": 5}, "must be between 1 and the 4"),
        ({"experts": 4, "score": "relu"}, "feed_forward.score must be one of softmax, sigmoid; got 'relu'"),
        ({"experts": 4, "experts_per_token": 1}, "renormalise must be false"),
        ({"experts": 4, "groups": 3}, "groups must divide the 4"),
        ({"experts": 8, "groups": 4, "chosen_groups": 5}, "chosen_groups must be between 1 and the 4"),
        ({"experts": 8, "groups": 4, "experts_per_token": 3}, "got 1 groups of 2"),
        ({"experts": 8, "groups": 4, "group_scores": 3}, "group_scores must be between 1 and the 2"),
        ({"experts": 8, "hidden": 0}, "hidden must be at least 1; got 0"),
        ({"experts": 8, "shared_gate": True}, "shared_hidden must be at least 1 with shared_gate=true; got 0"),
        ({"experts": 8, "balance": -0.1}, "balance must be at least 0; got -0.1"),
        ({"experts": 8, "activation": "relu2"}, "activation must be one of swiglu, gelu, .*; got 'relu2'"),
        ({"experts": 8, "activation": "relu", "limit": 7.0}, "limit must be null with activation=relu; got 7.0"),
        ({"experts": 8, "expert_width": 0}, "expert_width must be at least 1; got 0"),
        ({"experts": 8, "limit": 0.0}, r"feed_forward\.limit must be positive; got 0\.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MixtureOfExperts(**{"width": 8, "hidden": 4, **settings})


PACKED = Documents.from_lengths([[5, 12], [LENGTH], [3, 3, 18], [LENGTH - 1]], LENGTH)


def on_ranks(rank, world, settings, sequence, experts, spans):
    """Output, load and every gradient of this rank, whose weights are those of its experts."""
    mesh, made = Mesh.create(sequence, experts=experts), layer(**settings, balance=0.1, z=0.1)
    held = mesh.experts.held(12)
    with torch.no_grad():
        for each in made.experts.children():
            for name, whole in list(each.named_parameters()):
                setattr(each, name, torch.nn.Parameter(whole[held.start : held.stop].clone()))
    rows = 4 // mesh.data_ranks
    here = slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows)
    seq = Sequence.shared(PACKED.rows(here.start, here.stop), Layout(LENGTH, sequence, spans), mesh, Strategy())
    x, dout = (seq.shard(draw(4, LENGTH, WIDTH, seed=seed)[here]).requires_grad_() for seed in (0, 9))
    out, balance, z, load = made(x, seq)
    gradients = torch.autograd.grad((out * dout).sum() + balance + z, [x, *made.parameters()])
    return (mesh.data_rank, mesh.sequence_rank, held), out.detach(), load, gradients


@pytest.mark.parametrize(
    ("settings", "world", "sequence", "experts", "spans"),
    [
        (DEEPSEEK, 2, 1, 2, 1), (DEEPSEEK, 2, 2, 2, 2), (DEEPSEEK, 4, 2, 4, 1), (DEEPSEEK, 4, 4, 2, 2),
        (DEEPSEEK, 3, 3, 3, 1), (DEEPSEEK, 4, 1, 2, 1), (ALL, 2, 1, 2, 1), (ALL, 4, 2, 4, 1),
        (KINDS["nemotron_h"], 2, 2, 2, 2),
    ],
)  # fmt: skip
def test_ranks_that_share_the_experts_give_what_one_device_gives(settings, world, sequence, experts, spans):
    made, x = layer(**settings, balance=0.1, z=0.1), draw(4, LENGTH, WIDTH).requires_grad_()
    out, balance, z, load = made(x, Sequence.single(PACKED))
    leaves = [x, *made.parameters()]
    dx, *expected = torch.autograd.grad((out * draw(*out.shape, seed=9)).sum() + balance + z, leaves)
    results, layout = run_threads(world, on_ranks, settings, sequence, experts, spans), Layout(LENGTH, sequence, spans)
    totals, loads = [torch.zeros_like(each) for each in expected], torch.zeros_like(load)
    names = [name for name, _ in made.named_parameters()]
    for (data_rank, sequence_rank, held), got, own_load, (own_dx, *gradients) in results:
        rows = 4 // (world // sequence)
        here = slice(data_rank * rows, (data_rank + 1) * rows)
        close((got, own_dx), [layout.shard(each[here], sequence_rank) for each in (out.detach(), dx)])
        loads += own_load
        for name, total, gradient in zip(names, totals, gradients, strict=True):
            (total[held.start : held.stop] if name.startswith("experts") else total).add_(gradient)
    close(totals, expected)
    assert torch.equal(loads, load)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [KINDS["deepseek_v2"], ALL], ids=["deepseek_v2", "all"])
@pytest.mark.parametrize(("world", "experts"), [(1, 1), (2, 1), (2, 2)])
def test_waits_for_nothing(settings, world, experts):
    made = partial(MixtureOfExperts, hidden=16, balance=0.1, z=0.1, **settings)
    build = partial(small_hybrid, "softmax_attention", dtype=torch.bfloat16, depth=2, feed_forward=made)
    found = []
    watched_steps(build, found, world, experts=experts)
    assert not [str(each) for by_rank in found for each in by_rank]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ALL, KINDS["mixtral"]], ids=["all", "mixtral"])
def test_one_graph_holds_the_layer(settings):
    made, seq = layer(**settings, balance=0.1, z=0.1), Sequence.single(PACKED)
    x, parameters = draw(4, LENGTH, WIDTH), list(made.parameters())

    def total(run):
        def of(leaf):
            out, balance, z, _ = run(leaf, seq)
            return out + balance + z

        return of

    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    close(with_gradients(total(compiled), x, parameters), with_gradients(total(made), x, parameters))


def test_even_choices_are_a_router_s_own():
    """Of tokens whose scores are drawn: all experts alike, in as many groups as the router allows."""
    router = Router(8, 32, 4, groups=8, chosen_groups=2)
    chosen = router.even(2048)
    assert chosen.shape == (2048, 4)
    assert all(len(set(row.tolist())) == 4 for row in chosen[:64])
    assert (chosen // 4).sort(-1).values.diff(dim=-1).ne(0).sum(-1).max() + 1 <= 2
    load = torch.bincount(chosen.flatten(), minlength=32).double()
    assert load.sub(load.mean()).abs().max() < 5 * load.mean().sqrt()  # five standard deviations
