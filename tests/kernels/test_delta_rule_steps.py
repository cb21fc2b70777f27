"""The delta rule that erases under a key of its own, and that takes several steps per token."""

from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise
from recurrence_parts import OFTEN, PACKINGS, Parts, assert_near, nan_in_fresh_memory, run_op
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longreach.kernels.delta_rule import DeltaInputs, DeltaRecurrence, delta_rule
from longreach.kernels.documents import Documents

recurrence = Parts(DeltaRecurrence())
RULES, DECAYS, STEPS = ("beta", "pair", "key", "key alone", "key first"), ("none", "token", "channel"), (1, 2, 3)


def draw(documents, rule, decay, steps, *, strength=0.1, heads=4, groups=2, keys=6, values=10):
    """The inputs in float64, an initial state, and gradients of the output and of the final state."""
    generator = torch.Generator().manual_seed(0)
    shape, own = (documents.batch, documents.length), [steps] if steps > 1 else []

    def normal(*dims):
        return torch.randn(*shape, *dims, dtype=torch.float64, generator=generator)

    def uniform(*dims):
        return torch.rand(*shape, *dims, dtype=torch.float64, generator=generator)

    k = F.normalize(normal(groups, *own, keys), dim=-1)
    beta = a = b = erase = log_decay = None
    if rule == "pair":
        direction = F.normalize(normal(heads, *own, keys), dim=-1)
        a, b = -direction, direction * torch.rand_like(direction)
    if rule in ("beta", "key", "key first"):
        beta = 2 * uniform(heads, *own)
    if rule in ("key", "key first"):
        erase = k * uniform(groups, *own, 1)
    if rule == "key alone":
        erase = (k.repeat_interleave(heads // groups, 2)) * uniform(heads, *own, keys)
    if decay != "none":
        log_decay = -strength * uniform(heads, *([keys] if decay == "channel" else [])) ** 4
    inputs = DeltaInputs(normal(groups, keys), k, normal(heads, *own, values), beta, log_decay, a, b, erase)
    state = torch.randn(documents.batch, heads, keys, values, dtype=torch.float64, generator=generator)
    return inputs, state, normal(heads, values), state.flip(2)


def call(inputs, **settings):
    erase = inputs.erase if inputs.a is None else (inputs.a, inputs.b)
    return delta_rule(*inputs[:5], erase=erase, **settings)


def apply(*inputs, **settings):
    return call(DeltaInputs(*inputs), **settings)


run = partial(run_op, apply)


@pytest.mark.parametrize(("rule", "decay", "steps", "documents"), pairwise(RULES, DECAYS, STEPS, PACKINGS, often=OFTEN))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(rule, decay, steps, documents):
    inputs, state, *given = draw(documents, rule, decay, steps)
    first = {"erase_first": rule == "key first"}
    expected = run(inputs, state, documents, *given, backend="reference", **first)
    with nan_in_fresh_memory():
        assert_near(run(inputs, state, documents, *given, **first), expected, 1e-9)
        assert_near(run(inputs, state, documents, *given, dtype=torch.float32, **first), expected, 1e-4)


@pytest.mark.parametrize(("rule", "decay"), [("beta", "none"), ("key", "token"), ("pair", "channel")])
def test_several_steps_are_several_tokens_of_which_the_last_is_read(rule, decay):
    documents, steps = Documents.from_lengths([[5, 1, 20], [26]], 26), 3
    inputs, *_ = draw(documents, rule, decay, steps)
    flat = {
        name: x.transpose(2, 3).flatten(1, 2)
        for name in ("k", "v", "beta", "a", "b", "erase")
        if (x := getattr(inputs, name)) is not None
    }
    if decay != "none":
        decays = torch.zeros(*inputs.log_decay.shape[:2], steps, *inputs.log_decay.shape[2:], dtype=torch.float64)
        decays[:, :, 0] = inputs.log_decay
        flat["log_decay"] = decays.flatten(1, 2)
    flat["q"] = inputs.q.repeat_interleave(steps, 1)
    longer = Documents.from_lengths([[15, 3, 60], [78]], 78)
    out, final = call(inputs._replace(**flat), documents=longer, backend="reference")
    for backend in ("reference", "chunked"):
        assert_near(call(inputs, documents=documents, backend=backend), [out[:, steps - 1 :: steps], final], 1e-12)


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_a_key_to_erase_under_is_a_case_of_the_general_step(decay):
    documents = PACKINGS["packed"]
    inputs, state, dout, dstate = draw(documents, "key", decay, 1, groups=4)
    factor = 1.0 if decay == "none" else inputs.log_decay.exp().view(*inputs.k.shape[:3], -1)
    a = -inputs.beta[..., None] * inputs.erase
    general = inputs._replace(v=inputs.v * inputs.beta[..., None], beta=None, erase=None, a=a * factor, b=inputs.k)
    for first, each in ((False, general), (True, general._replace(a=a))):
        expected = run(each, state, documents, dout, dstate)
        found = run(inputs, state, documents, dout, dstate, erase_first=first)
        assert_near([*found[:3], found[-1]], [*expected[:3], expected[-1]], 1e-9)
    found = run(inputs, state, documents, dout, dstate)
    same = run(inputs._replace(erase=inputs.k), state, documents, dout, dstate)
    plain = run(inputs._replace(erase=None), state, documents, dout, dstate)
    assert_near(same[:3], plain[:3], 1e-12)
    assert_near([same[3] + same[-2]], [plain[3]], 1e-12)


@pytest.mark.parametrize(
    ("rule", "decay", "steps"), [("beta", "token", 3), ("key alone", "channel", 1), ("pair", "token", 2)]
)
def test_segments_put_together_are_the_whole_row(rule, decay, steps):
    documents = Documents.from_lengths([[90], [30, 60], [20, 1, 69]], 90)
    inputs, _, dout, dfinal = draw(documents, rule, decay, steps)
    *whole, _ = run(inputs, torch.zeros_like(dfinal), documents, dout, dfinal)
    check.segments(recurrence, inputs, dout, dfinal, whole, documents, (31, 52, 90))


@pytest.mark.parametrize(
    ("rule", "decay", "steps"), [("key first", "token", 1), ("key alone", "channel", 1), ("beta", "channel", 2)]
)
def test_strong_decay_neither_overflows_nor_forgets_the_present(rule, decay, steps):
    documents = Documents.from_lengths([[150, *[1] * 20, 30]])
    inputs, state, *given = draw(documents, rule, decay, steps)
    inputs = inputs._replace(log_decay=torch.full_like(inputs.log_decay, -20.0))
    first = {"erase_first": rule == "key first"}
    found = run(inputs, state, documents, *given, dtype=torch.float32, **first)
    assert_near(found, run(inputs, state, documents, *given, backend="reference", **first), 1e-4)


def test_token_by_token_is_the_whole():
    inputs, *_ = draw(Documents.whole(2, 11), "beta", "token", 3)
    check.token_by_token(apply, inputs)


class LargestStorage(TorchDispatchMode):
    """`bytes`: those of the largest memory that any operation returned, but for that of the tensors passed."""

    def __init__(self, *given):
        super().__init__()
        self.bytes, self.given = 0, {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rule", ["beta", "key"])
def test_no_memory_grows_with_the_steps_but_that_of_what_they_bring(rule):
    """Where the steps lie before the heads in memory, they are read where they are."""
    documents = Documents.whole(1, 2400)
    inputs, *_ = draw(documents, rule, "token", 6, heads=2, groups=1, keys=16, values=32)
    laid_out = {
        name: x.float().transpose(2, 3).contiguous().transpose(2, 3)
        for name in ("k", "v", "beta", "erase")
        if (x := getattr(inputs, name)) is not None
    }
    inputs = inputs._replace(q=inputs.q.float(), log_decay=inputs.log_decay.float(), **laid_out)
    with LargestStorage(*(x for x in inputs if x is not None)) as largest:
        out, _ = call(inputs, documents=documents)
    assert largest.bytes <= out.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": "one"}, "v must have the steps per token that k has, here 3"),
        ({"beta": "one"}, "beta must have the steps per token that k has, here 3"),
        ({"k": "one"}, "v must have the steps per token that k has, here 1"),
        ({"erase": "one"}, "erase must have the steps per token that k has, here 3"),
        ({"v": "fewer"}, r"v must be \[B, T, H, V\] or \[B, T, H, N, V\]"),
    ],
)
def test_steps_of_some_inputs_alone_are_refused(change, message):
    inputs, *_ = draw(Documents.whole(1, 4), "key", "token", 3)
    changed = {
        name: getattr(inputs, name)[:, :, :, 0] if how == "one" else getattr(inputs, name)[:, :, :, :2]
        for name, how in change.items()
    }
    with pytest.raises(ValueError, match=message):
        call(inputs._replace(**changed))


def test_what_does_not_go_with_a_pair_is_refused():
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match="erase must be a pair of tensors, in place of beta"):
        DeltaRecurrence()(DeltaInputs(x, x, x, None, None, x, x, x))
    with pytest.raises(ValueError, match="erase_first must be left out with a pair"):
        delta_rule(x, x, x, erase=(x, x), erase_first=True)
