"""What bfloat16 loses in every mixer, told by float64 of the same rounded numbers; planted faults are found."""

from contextlib import contextmanager

import planted_roundings
import pytest
import torch
from distributed import run_threads
from model_presets import MIXERS, WIDTH, as_new, build_mixer, few_mixers, small_hybrid, tokens

from longreach.kernels.documents import Documents
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.diagnosis.checks.comparison import of_norms
from longreach.trainer.diagnosis.checks.inexact import ROUNDED_INSIDE
from longreach.trainer.diagnosis.checks.precision import noted_ops, of_ops, plain_rotations

LENGTH = 2048
DOCUMENTS = Documents.from_lengths([[1900, 148]], LENGTH)
FAR = Documents.whole(1, LENGTH, position=100_000)
# Relative norm. Activations that are rounded, a dozen times on the way, make 0.4 to 2 %; what adds up rounded numbers
# makes more with every token.
GRADIENTS = 0.03
# Gradients that are the little that is left of large parts, by mixer and parameter, with bounds of their own: what all
# input gates have in common cancels wherever an output is divided by what it sums, and leaves hundredths of its parts.
# What scores keys by ReLUs learns from the difference of two distributions: rounding its projections alone, in an
# otherwise exact model, makes 10 %.
CANCELS = {
    "mlstm_block": {"input_gate.bias": 0.7},
    **{
        f"{mixer}_attention": {
            f"indexer.{name}": 0.15 for name in ("query.weight", "key.weight", "key_norm.weight", "key_norm.bias")
        }
        for mixer in ("deepseek_sparse", "sparse_latent")
    },
}
# Of one or two numbers a head, each a sum over all tokens in which much cancels, so many draws are one vector: of a
# single one the error is anything from 0.7 to 3.3 %.
DRAWS = {"comba": 4}
ROUNDINGS = 1.25  # of an op, which rounds once; a gradient may be the sum of two parts that do
INSIDE = 2.0  # of one that also rounds what it computes on the way, see ROUNDED_INSIDE


def one_of(rank, world, spans, documents, strategy=None):
    if world == 1:
        return Sequence.single(documents)
    layout, strategy = Layout(LENGTH, world, spans), strategy or Strategy()
    heads = world if "ulysses" in (strategy.attention, strategy.recurrent) else 1
    return Sequence.shared(documents, layout, Mesh.create(world, heads), strategy)


def draw(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LENGTH, WIDTH, generator=generator).bfloat16() for _ in range(2)]


def build(name):
    """A mixer as a run begins it: of the name of its YAML, or of a class here."""
    return as_new(planted_roundings.ForgettingAttention() if name == "forgetting" else name)


@contextmanager
def planted(fault):
    """Inside, the fault of this name, if any."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            getattr(planted_roundings, fault)(patch)
        yield


def gradients_of_rank(rank, world, name, spans, documents, seed, dtype=torch.bfloat16, lists=None):
    """Gradients of parameters and input, and the lists that a selector gave, or is to give, for what a rank holds."""
    seq, noted = one_of(rank, world, spans, documents), []
    mixer = build(name).bfloat16().to(dtype)
    if hasattr(mixer, "selector"):
        mixer.selector.register_forward_hook(lambda *call: noted.append(call[-1]) if lists is None else lists)
    x, dout = (seq.shard(part).to(dtype) for part in draw(seed))
    x.requires_grad_()
    mixer(x, seq).backward(dout)
    return (
        {label: p.grad.float() if dtype.itemsize == 2 else p.grad for label, p in mixer.named_parameters()},
        x.grad,
        noted,
    )


def errors(name, world=1, spans=1, documents=DOCUMENTS, fault=None):
    """Relative errors of the gradients of all parameters, summed over ranks as engines do, and of the input."""
    found, exact = {}, {}
    for seed in range(1, 1 + DRAWS.get(name, 1)):
        for label, (rounded, truth) in _gradients(name, world, spans, documents, fault, seed).items():
            found.setdefault(label, []).append(rounded)
            exact.setdefault(label, []).append(truth)
    return of_norms(*({label: torch.stack(each) for label, each in parts.items()} for parts in (found, exact)))


def _gradients(name, world, spans, documents, fault, seed):
    """By label, in bfloat16 on ranks and in float64 alone."""
    layout = Layout(LENGTH, world, spans)
    with planted(fault):
        parts = run_threads(world, gradients_of_rank, name, spans, documents, seed)
    lists = layout.unshard([part[2][0] for part in parts]) if parts[0][2] else None
    with plain_rotations(documents):
        exact, dx, _ = gradients_of_rank(0, 1, name, 1, documents, seed, torch.float64, lists)
    got = {label: sum(part[0][label] for part in parts) for label in exact}
    got["input"], exact["input"] = layout.unshard([part[1] for part in parts]), dx
    return {label: (got[label], exact[label]) for label in exact}


def roundings_of_rank(rank, world, noted, name, spans, strategy):
    """The largest error of each op's output and gradients, in roundings; `noted` are the calls of all ranks."""
    seq, found = one_of(rank, world, spans, DOCUMENTS, strategy), {}
    with torch.no_grad():
        build_mixer(name, torch.bfloat16)(seq.shard(draw()[0]), seq)
    for error, place in of_ops([each for each in noted if each.seq.rank == rank], torch.bfloat16):
        found[place] = max(error, found.get(place, 0.0))
    return found


def roundings(name, world=1, spans=1, strategy=None, fault=None):
    with planted(fault), noted_ops() as noted:
        parts = run_threads(world, roundings_of_rank, noted, name, spans, strategy)
    return {place: max(part[place] for part in parts) for place in parts[0]}


def assert_small(name, found):
    """Each gradient is off by no more than gradients of its kind are."""
    bounds = CANCELS.get(name, {})
    assert bounds.keys() <= found.keys()
    assert all(error < bounds.get(label, GRADIENTS) for label, error in found.items()), found


def allowed(place):
    return INSIDE if place.split(":")[0] in ROUNDED_INSIDE else ROUNDINGS


def some(*often):
    """Every mixer, those not named here with the slow tests."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]


def few(*often):
    """The same for what follows from the ops: mixers that use no other ops than some mixers run with `-m many`."""
    rarely = {name: pytest.mark.slow if name in few_mixers() else pytest.mark.many for name in MIXERS}
    return [name if name in often else pytest.param(name, marks=mark) for name, mark in rarely.items()]


@pytest.mark.parametrize("name", some("softmax_attention", "gated_deltanet", "mlstm"))
def test_gradients_in_bfloat16_are_those_of_float64(name):
    assert_small(name, errors(name))


@pytest.mark.parametrize("name", few("infllm_v2", "mlstm", "mamba"))
def test_every_op_adds_up_in_float32_and_rounds_once(name):
    found = roundings(name)
    assert found
    assert all(error < allowed(place) for place, error in found.items()), found


@pytest.mark.parametrize("name", few("gated_linear_attention"))
def test_gradients_on_two_ranks_are_those_of_float64(name):
    assert_small(name, errors(name, 2, 2))


@pytest.mark.parametrize("name", few("softmax_attention"))
def test_every_op_on_two_ranks_adds_up_in_float32_and_rounds_once(name):
    found = roundings(name, 2, 2)
    assert all(error < allowed(place) for place, error in found.items()), found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy("gather"), Strategy("ulysses", "ulysses")], ids=str)
@pytest.mark.parametrize("name", ["softmax_attention", "gated_deltanet", "mamba2"])
def test_other_strategies_round_once_too(name, strategy):
    found = roundings(name, 2, 1, strategy)
    assert max(found.values()) < ROUNDINGS, found


@pytest.mark.parametrize("name", ["softmax_attention", "retnet"])
def test_a_hundred_thousand_tokens_on_rotations_are_as_exact(name):
    assert_small(name, errors(name, documents=FAR))


def test_every_parameter_of_a_model_has_the_gradient_of_float64():
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        model = small_hybrid("lightning_attention", dtype=torch.float64, tied_embeddings=True, vocabulary=11)
        model.initialise(0)
        model.bfloat16().to(dtype)
        seq = Sequence.single(DOCUMENTS)
        loss, count = model(tokens(1, LENGTH, 11), seq, tokens(1, LENGTH, 11).roll(-1, dims=1))
        (loss / count).backward()
        gradients[dtype] = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = of_norms(gradients[torch.bfloat16], gradients[torch.float64])
    assert max(found.values()) < GRADIENTS, found


@pytest.mark.parametrize("world", [1, 2])
def test_a_gate_whose_sums_are_made_of_rounded_gradients_is_found(world):
    assert errors("forgetting", world, world)["forget.weight"] > 3 * GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name", "place"),
    [
        ("queries_gradient_added_up_rounded", "softmax_attention", "softmax_attention: gradient of q"),
        ("blocks_gradient_added_up_rounded", "moba", "block_sparse_attention: gradient of q"),
        ("window_means_added_up_rounded", "moba", "window_means: output"),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_an_op_that_adds_up_in_bfloat16_is_found(world, fault, name, place):
    assert roundings(name, world, world, fault=fault)[place] > 1.2 * ROUNDINGS


@pytest.mark.parametrize("fault", ["positions_rounded", "angles_rounded"])
@pytest.mark.parametrize("world", [1, 2])
def test_rotations_that_are_rounded_are_found(world, fault):
    assert max(errors("softmax_attention", world, world, fault=fault).values()) > 2 * GRADIENTS
