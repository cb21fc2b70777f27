"""The language model: pattern, loss, initial values, recomputation, cost."""

from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from model_presets import MIXERS, SOURCES, build_model, few_or_slow, mixer_partial, small_hybrid, tokens, total_loss
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import chunked
from longreach.kernels.gated_linear import flops as gated_linear_flops
from longreach.kernels.latent.listed import ListedLatentAttend
from longreach.models.layers.block_diagonal import BlockDiagonalLinear
from longreach.models.layers.feature_maps import FeatureMap
from longreach.models.layers.selectors.block_gate import GroupedLinear
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.native_sparse_attention import NativeSparseAttention
from longreach.models.part import cast_parameters
from longreach.models.pattern import expand_pattern
from longreach.parallel.sequence import Sequence

LENGTH = 40
PACKED = Documents.from_lengths([[9, 22, 6], [LENGTH]], LENGTH)  # the first row ends in padding


def packed_targets():
    targets = tokens(2, LENGTH).roll(-1, dims=1)
    for row, runs in enumerate(PACKED.runs):
        for run in runs:
            targets[row, run.start if run.is_padding else run.stop - 1 : run.stop] = -100
    return targets


def test_the_pattern_is_tiled_to_the_depth():
    assert expand_pattern(["a*3", "b"], 8, ["a", "b"]) == ["a", "a", "a", "b"] * 2
    assert expand_pattern(["a"], 3, ["a"]) == ["a"] * 3


@pytest.mark.parametrize(
    ("pattern", "depth", "message"),
    [
        (["a*3", "b"], 6, "depth must be a multiple of the pattern's 4 layers; got 6"),
        ([], 4, r"model.pattern must name at least one mixer; got \[\]. Known: a, b"),
        ([1, "b"], 4, r"names of model.mixers \(a, b\); got 1"),
        (["a", "c"], 4, r"names of model.mixers \(a, b\); got 'c'"),
        (["a*0", "b"], 4, "positive number, as in a\\*3; got 'a\\*0'"),
        (["a*x", "b"], 4, "positive number"),
        (["a*", "b"], 4, "positive number"),
        (["a"], 4, "got b besides"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(pattern, depth, message):
    with pytest.raises(ValueError, match=message):
        expand_pattern(pattern, depth, ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "model.width must be at least 1; got 0"),
        ({"vocabulary": 0}, "model.vocabulary must be at least 1"),
        ({"norm_eps": -1e-6}, "model.norm_eps must not be negative; got -1e-06"),
        ({"initial_std": -0.02}, "model.initial_std must not be negative; got -0.02"),
        ({"activation_checkpointing": "some"}, "must be one of none, full, mixing; got 'some'"),
        (
            {"mixers": {"softmax": {"head": 8}}},
            "model.mixers.softmax must use settings of SoftmaxAttention; got 'head'",
        ),
        ({"mixers": {"lightning": {"heads": 7}}}, "heads must divide width=256; got 7"),
        (
            {"mixers": {"lightning": {"head_dim": -4}}},
            r"Attention\): sizes must be positive; got a tensor of \[",
        ),
        (
            {"mixers": {"lightning": {"head_dim": 0}}},
            r"Attention\): sizes must be positive; got query.weight of \[",
        ),
        ({"feed_forward": {"hidden": 0}}, "feed_forward.hidden must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(**changes)


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match=r"model.mixers.softmax must give heads; got nothing"):
        small_hybrid("softmax_attention", pattern=["softmax"], mixers={"softmax": SoftmaxAttention})


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_sum_of_the_targets_cross_entropies(tied):
    model = small_hybrid("lightning_attention", tied_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    inputs, targets, seq = tokens(2, LENGTH), packed_targets(), Sequence.single(PACKED)
    loss, count = model(inputs, seq, targets)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    logits = model(inputs, seq)
    assert logits.shape == (2, LENGTH, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert count == (targets >= 0).sum() == 8 + 21 + 5 + LENGTH - 1
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_no_target_gives_a_zero_that_reaches_every_parameter():
    model = small_hybrid("lightning_attention")
    loss, count = model(tokens(2, LENGTH), Sequence.single(PACKED), torch.full((2, LENGTH), -100))
    assert loss.item() == 0
    assert count.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_recomputation_changes_no_gradient(name):
    results = []
    for setting in ("none", "full", "mixing"):
        model = small_hybrid(name, activation_checkpointing=setting)
        loss, _ = total_loss(model, tokens(2, LENGTH), Sequence.single(PACKED), packed_targets())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for recomputed in results[1:]:
        torch.testing.assert_close(recomputed, results[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("checkpointing", "runs"), [("none", 2), ("full", 4), ("mixing", 2)])
def test_mixing_ops_run_again_only_under_full_recomputation(checkpointing, runs, monkeypatch):
    calls, forward = [], chunked.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(chunked, "forward", counted)
    model = small_hybrid("lightning_attention", activation_checkpointing=checkpointing)
    loss, _ = model(tokens(2, LENGTH), Sequence.single(PACKED), packed_targets())
    loss.backward()
    assert len(calls) == runs


def test_full_recomputation_keeps_fewer_activations_than_none():
    def kept(checkpointing):
        model, sizes = small_hybrid("lightning_attention", activation_checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens(2, LENGTH), Sequence.single(PACKED), packed_targets())
        return sum(sizes)

    assert kept("full") < kept("none") / 3


def initial_values(seed=0, order=1, dtype=torch.float32, **changes):
    model = small_hybrid("lightning_attention", dtype=dtype, **changes)
    if order == -1:  # the same parameters, registered in another order
        for module in model.modules():
            module._parameters = dict(reversed(module._parameters.items()))
            module._modules = dict(reversed(module._modules.items()))
    model.initialise(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_initial_values_depend_on_seed_and_name_alone():
    plain = initial_values()
    reordered, wide, other = initial_values(order=-1), initial_values(dtype=torch.float64), initial_values(seed=1)
    assert list(reordered) != list(plain)
    for name, value in plain.items():
        assert torch.equal(reordered[name], value)
        assert torch.equal(wide[name].float(), value)
        assert torch.equal(other[name], value) == (value.dim() == 1), name
    half = initial_values(dtype=torch.bfloat16)
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in plain.items())
    deeper = initial_values(depth=8)
    assert torch.equal(deeper["blocks.1.mixer.query.weight"], plain["blocks.1.mixer.query.weight"])
    matrices = [value.flatten()[:8] for value in plain.values() if value.dim() > 1]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def test_initial_values_have_their_scales():
    values = initial_values(initial_std=0.1)
    assert values["embedding.weight"].std().item() == pytest.approx(0.1, rel=0.05)
    assert values["blocks.0.mixer.query.weight"].std().item() == pytest.approx(0.1, rel=0.1)
    for name in ("blocks.0.mixer.output.weight", "blocks.2.feed_forward.down.weight"):
        assert values[name].std().item() == pytest.approx(0.1 / 8**0.5, rel=0.1)
    assert all((values[name] == 1).all() for name in values if "norm" in name)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_knows_its_initial_values(name):
    model = small_hybrid(name)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.initialise(0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 3, pytest.param(64, marks=pytest.mark.slow)])
def test_ranks_share_the_drawing_of_initial_values_and_fill_one_parameter_at_a_time(ranks, monkeypatch):
    models, drawn, written = [small_hybrid("mamba2") for _ in range(ranks)], [[] for _ in range(ranks)], []

    def on(rank):
        model, open_ones = models[rank], []
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def draw(name, shape, seed):
            drawn[rank].append(name)
            return type(model).initial_value(model, name, shape, seed)

        @contextmanager
        def write(parameter, owner):
            assert not open_ones
            open_ones.append(parameter)
            yield
            open_ones.pop()
            if owner == rank:
                written.append((names[id(parameter)], owner, parameter.detach()))

        monkeypatch.setattr(model, "initial_value", draw)
        model.initialise(0, write, rank, ranks)
        return list(names.values())

    names = [on(rank) for rank in range(ranks)][-1]
    assert [names[rank::ranks] for rank in range(ranks)] == drawn
    assert sorted(name for name, _, _ in written) == sorted(names)
    whole = small_hybrid("mamba2")
    whole.initialise(0)
    for name, owner, value in written:
        assert names.index(name) % ranks == owner
        assert torch.equal(value, whole.get_parameter(name))


def test_a_value_that_cannot_be_drawn_is_told_after_the_last_parameter():
    model, entered = small_hybrid("lightning_attention"), []
    model.blocks[0].mixer.initialise_parameter = lambda *_: None
    with pytest.raises(ValueError, match="must be answered for with True or False"):
        model.initialise(0, lambda parameter, owner: nullcontext(entered.append(owner)), 0, 2)
    assert entered == [number % 2 for number in range(len(list(model.parameters())))]


@pytest.mark.slow
def test_what_becomes_an_exponent_stays_in_float32():
    expected = {
        "mamba2": {"A_log", "dt_bias"},
        "mamba": {"A_log", "dt_bias"},
        "gated_deltanet": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "kimi_delta_attention": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "kimi_delta_attention_bounded": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "gated_deltanet2": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "gated_deltaproduct": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "comba": {"decay_gate.A_log", "decay_gate.dt_bias"},
        "gated_linear_attention": {"decay.up.bias"},
        "mlstm": {"input_gate.bias", "forget_gate.bias"},
        "rwkv4": {"decay", "bonus"},
        "rwkv5": {"decay"},
        "rwkv6": {"decay.up.bias"},
        "rwkv7": {"decay.up.bias"},
    }
    for name in MIXERS:
        model = small_hybrid(name)
        cast_parameters(model, torch.bfloat16)
        mixer = model.blocks[0].get_submodule("mixer_2" if name in SOURCES else "mixer")
        kept = {each for each, p in mixer.named_parameters() if p.dtype == torch.float32}
        assert kept == expected.get(name, kept), name
        others = {each for each, p in model.named_parameters() if p.dtype == torch.float32}
        assert all(".mixer" in each for each in others)
        cast_parameters(model, torch.float64)
        assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_flops_are_a_hand_count():
    model = small_hybrid("lightning_attention", tied_embeddings=True)
    width, hidden, vocabulary, row_tokens = 32, 48, 61, 2 * LENGTH
    pairs = sum(n * (n + 1) // 2 for n in (9, 22, 6, LENGTH))
    lightning = 5 * width * width
    softmax = 2 * width * width + 2 * width * 16  # 4 heads of 8, 2 of keys and values
    weights = 2 * (lightning + softmax) + 4 * 3 * width * hidden + width * vocabulary
    ops = 2 * gated_linear_flops(row_tokens, heads=4, key_dim=8, value_dim=8) + 2 * (2 * pairs * 4 * (8 + 8))
    assert model.flops(PACKED) == 2 * weights * row_tokens + ops
    assert model.parameter_count() == weights + 32 * (2 * 4 + 2 + 1)


def flops_of_linear_layers(model):
    """What torch counts, by the path of each layer, without the products of an op that runs inside one."""
    no_products = mock.patch.object(ListedLatentAttend, "attend", lambda op, inputs, *_: op.zeros(inputs))
    with no_products, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(2, LENGTH), Sequence.single(PACKED))
    kinds = torch.nn.Linear, BlockDiagonalLinear, FeatureMap, GroupedLinear
    linear = {f"LanguageModel.{path}": path for path, m in model.named_modules() if isinstance(m, kinds)}
    counts = counter.get_flop_counts()
    return {linear[path]: sum(of.values()) for path, of in counts.items() if path in linear}


@pytest.mark.parametrize("name", few_or_slow())
def test_flops_of_linear_layers_are_those_that_torch_counts(name):
    model, seq = small_hybrid(name), Sequence.single(PACKED)
    counted = flops_of_linear_layers(model)
    for path, part in model.leaves():
        own = sum(count for layer, count in counted.items() if layer.startswith(f"{path}."))
        assert part.flops(seq) - part.mixing_flops(seq) == own, path
        assert own > 0 or not list(part.parameters()), path
    ops = sum(part.mixing_flops(seq) for _, part in model.leaves())
    assert model.flops(PACKED) - ops == sum(counted.values())


@pytest.mark.parametrize(
    ("size", "stride", "kv_heads"),
    [(7, 7, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(6, 3, 4), (8, 4, 2)])],
)
def test_a_layer_that_runs_per_window_costs_what_torch_counts(size, stride, kv_heads):
    settings = {"heads": 4, "kv_heads": kv_heads, "window_size": size, "window_stride": stride, "block_size": stride}
    mixer = partial(NativeSparseAttention, near=5, count=2, initial=0, local=1, **settings)
    model, seq = small_hybrid("softmax_attention", mixers={"nsa": mixer}, pattern=["nsa"]), Sequence.single(PACKED)
    counted = flops_of_linear_layers(model)
    compression = sum(count for path, count in counted.items() if ".compress_" in path)
    windows = -(-LENGTH // stride)
    assert compression == 4 * 2 * (2 * windows * kv_heads * (size * 8 * 32 + 32 * 8)) * 2
    ops = sum(part.mixing_flops(seq) for _, part in model.leaves())
    assert model.flops(PACKED) - ops == sum(counted.values())


def test_packing_costs_less_attention_than_one_document():
    model = small_hybrid(
        "softmax_attention", mixers={"softmax": mixer_partial("softmax_attention")}, pattern=["softmax"]
    )
    assert model.flops(PACKED) < model.flops(Documents.whole(2, LENGTH))


class Publishing(SoftmaxAttention):
    """Gives its input to the later layers of its name, which add a part of it."""

    def __init__(self, *, width, heads=4, occurrence=0):
        super().__init__(width=width, heads=heads)
        self.publishes, self.reads = (("seen",), ()) if occurrence == 0 else ((), ("seen",))

    def forward(self, x, seq, *read):
        return (super().forward(x, seq), x) if self.publishes else super().forward(x + 0.3 * read[0], seq)


def publishing_model(pattern=("publishing", "softmax", "publishing"), depth=6, **changes):
    mixers = {"publishing": partial(Publishing), "softmax": mixer_partial("softmax_attention")}
    settings = {"mixers": mixers, "pattern": list(pattern), "depth": depth, **changes}
    return small_hybrid("softmax_attention", **settings)


def test_what_a_layer_publishes_reaches_the_layers_that_read_it_and_gradients_come_back():
    results = []
    for checkpointing in ("none", "full", "mixing"):
        model = publishing_model(activation_checkpointing=checkpointing)
        loss, _ = model(tokens(2, LENGTH), Sequence.single(PACKED), packed_targets())
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-9, rtol=1e-9)

    x = model.embedding(tokens(2, LENGTH))
    seq = Sequence.single(PACKED)
    x, seen = model.blocks[0](x, seq)
    for layer, block in enumerate(model.blocks):
        if layer > 0:
            x = block(x, seq.at(layer), *([seen] if model.mixers[layer].reads else []))
    torch.testing.assert_close(model.norm(x), model.hidden(tokens(2, LENGTH), seq), atol=1e-9, rtol=1e-9)


def test_a_layer_that_reads_what_nobody_gave_is_refused():
    class Reading(Publishing):
        def __init__(self, *, width):
            super().__init__(width=width, occurrence=1)

    mixers = {"reading": partial(Reading), "softmax": mixer_partial("softmax_attention")}
    with pytest.raises(ValueError, match="got no seen from the layers before Reading"):
        publishing_model(["softmax", "reading"], 2, mixers=mixers)
