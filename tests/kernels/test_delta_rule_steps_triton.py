"""Triton's delta rule with keys of its own to erase under, and with several steps per token, as in
`test_delta_rule_triton`.
"""

import pytest
import torch
from recurrence_parts import assert_near, nan_in_fresh_memory
from test_delta_rule_steps import call, draw, recurrence, run

from longreach.kernels.delta_rule import DeltaInputs
from longreach.kernels.documents import Documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(inputs, *rest):
    return DeltaInputs(*(None if x is None else x.to(DEVICE) for x in inputs)), *(x.to(DEVICE) for x in rest)


@pytest.mark.parametrize(
    ("rule", "decay", "steps", "length"),
    [
        ("key", "token", 1, 74), ("key first", "token", 1, 74), ("key alone", "channel", 1, 74),
        ("beta", "none", 2, 37), ("beta", "token", 3, 30), ("pair", "token", 2, 37), ("key first", "channel", 2, 37),
    ],
)  # fmt: skip
def test_outputs_states_and_gradients_are_those_of_the_recurrence(rule, decay, steps, length):
    documents = Documents.from_lengths([[5, 1, length - 11, 3]], length).slice(2, length)
    inputs, *rest = draw(documents, rule, decay, steps, heads=2, groups=1, keys=5, values=3)
    inputs, state, *given = on_device(inputs, *rest)
    first = {"erase_first": rule == "key first"}
    expected = run(inputs, state, documents, *given, backend="reference", **first)
    with nan_in_fresh_memory():
        found = run(inputs, state, documents, *given, backend="triton", dtype=torch.float32, **first)
    assert_near(found, expected, 1e-4)


def test_dims_in_several_blocks():
    documents = Documents.whole(1, 20)
    inputs, *rest = draw(documents, "key", "token", 1, heads=1, groups=1, keys=40, values=72)
    inputs, state, *given = on_device(inputs, *rest)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given, backend="triton", dtype=torch.float32), expected, 1e-4)


@pytest.mark.parametrize(("rule", "steps"), [("key", 1), ("beta", 3)])
def test_a_run_from_nothing_is_that_of_the_recurrence(rule, steps):
    documents = Documents.from_lengths([[27, 5]]).slice(2, 32)
    inputs, *_ = draw(documents, rule, "token", steps, heads=1, groups=1, keys=5, values=3)
    (inputs,) = on_device(inputs)
    single = DeltaInputs(*(None if x is None else x.float() for x in inputs))
    expected = recurrence.begin(inputs, documents, backend="reference")
    found = recurrence.begin(single, documents, backend="triton")
    assert_near([found.out, *found.summary, found.reads], [expected.out, *expected.summary, expected.reads], 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rule", "decay", "steps"), [("key", "token", 1), ("key alone", "channel", 1), ("beta", "token", 2)]
)
def test_bfloat16_at_real_sizes(rule, decay, steps):
    documents = Documents.from_lengths([[700, 1, 323], [1024]], 1024).slice(10, 1024)
    inputs, state, dout, dstate = draw(documents, rule, decay, steps, keys=128, values=128)
    rounded = DeltaInputs(*(None if x is None else x.bfloat16().double() for x in inputs))
    rounded, state, dout, dstate = on_device(rounded, state, dout.bfloat16().double(), dstate)
    expected = run(rounded, state, documents, dout, dstate, backend="reference")
    leaves = [x if x is None else x.bfloat16().requires_grad_() for x in rounded]
    out, final = call(DeltaInputs(*leaves), initial_state=state.float(), documents=documents, backend="triton")
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad([out, final], wanted, [dout.bfloat16(), dstate.float()])
    for ours, right in zip((out, final, *gradients), expected, strict=False):
        assert (ours.double() - right).norm() <= 2e-2 * right.norm()
