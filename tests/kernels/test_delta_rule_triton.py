"""Triton's delta rule against its recurrence in float64: under the interpreter, and on a GPU where there is one.

The interpreter takes some milliseconds a step, so that a case is two chunks of two heads that share their keys there.
"""

import pytest
import torch
from recurrence_parts import assert_near, nan_in_fresh_memory
from test_delta_rule import call, draw, recurrence, run

from longreach.kernels.delta_rule import delta_rule
from longreach.kernels.delta_rule import triton as kernels
from longreach.kernels.documents import Documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A document that goes on, one that crosses chunks, one of one token, and an end within a chunk.
PACKED = Documents.from_lengths([[5, 45, 1, 25]], 76).slice(2, 76)
CASES = [("beta", "none"), ("beta", "token"), ("beta", "channel"), ("erase", "token"), ("erase", "channel")]


def on(device, *groups):
    return [tuple(None if x is None else x.to(device) for x in group) for group in groups]


def both(documents, rule, decay, dtype=torch.float32, strength=0.1, **sizes):
    """What Triton gives for inputs of `dtype`, and what the recurrence gives for the same in float64."""
    inputs, state, dout, dstate = draw(documents, rule, decay, strength, **{"heads": 2, "groups": 1, **sizes})
    inputs = tuple(x if x is None else x.to(dtype).double() for x in inputs)
    dout = dout.to(dtype).double()
    inputs, rest = on(DEVICE, inputs, (state, dout, dstate))
    expected = run(inputs, rest[0], documents, *rest[1:], backend="reference")
    leaves = [x if x is None else x.to(dtype).requires_grad_() for x in inputs]
    state = rest[0].float().requires_grad_()
    with nan_in_fresh_memory():
        out, final = call(leaves, initial_state=state, documents=documents, backend="triton")
        wanted = [x for x in (*leaves, state) if x is not None]
        gradients = torch.autograd.grad([out, final], wanted, [rest[1].to(dtype), rest[2].float()])
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    return (out.detach(), final.detach(), *gradients), expected


def assert_close_in_norm(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-12


@pytest.mark.parametrize(("rule", "decay"), CASES)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(rule, decay):
    assert_near(*both(PACKED, rule, decay), 1e-4)


@pytest.mark.parametrize(("rule", "decay"), [("beta", "token"), ("erase", "channel")])
def test_bfloat16(repaired_bf16, rule, decay):
    assert_close_in_norm(*both(PACKED, rule, decay, torch.bfloat16), 2e-2)


@pytest.mark.parametrize(("rule", "decay"), [("beta", "channel"), ("erase", "channel")])
def test_strong_decay(rule, decay):
    documents = Documents.whole(1, 40, position=3)
    assert_near(*both(documents, rule, decay, strength=20.0, heads=1, keys=3, values=2), 1e-4)


def test_dims_in_several_blocks_and_no_beta():
    documents = Documents.whole(1, 20)
    (q, k, v, _, log_decay, *_), state, *given = draw(documents, "beta", "token", heads=1, groups=1, keys=40, values=72)
    inputs, rest = on(DEVICE, (q, k, v, None, log_decay, None, None), (state, *given))
    expected = run(inputs, rest[0], documents, *rest[1:], backend="reference")
    found = run(inputs, rest[0], documents, *rest[1:], backend="triton", dtype=torch.float32)
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("rule", ["beta", "erase"])
def test_a_run_from_nothing_is_that_of_the_recurrence(rule):
    documents = Documents.whole(1, 70, position=3)
    inputs, _, dout, _ = draw(documents, rule, "channel", heads=1, groups=1, keys=5, values=3)
    inputs, (dout,) = on(DEVICE, inputs, (dout,))
    single = tuple(x if x is None else x.float() for x in inputs)
    expected = recurrence.begin(inputs, documents, backend="reference")
    found = recurrence.begin(single, documents, backend="triton")
    assert_near([found.out, *found.summary, found.reads], [expected.out, *expected.summary, expected.reads], 1e-4)
    local = recurrence.summarize_backward(dout, inputs, None, documents, expected.reads)
    again = recurrence.summarize_backward(dout.float(), single, None, documents, found.reads, backend="triton")
    assert_near([again], [local], 1e-4)
    ends = Documents.from_lengths([[70]])
    found = recurrence.begin(single, ends, backend="triton")
    assert not found.summary.transition.any()
    assert not found.reads.any()


@pytest.mark.parametrize("reached", [3, 64])
def test_what_is_read_of_an_entering_state_ends_with_its_document(reached):
    documents = Documents.from_lengths([[reached + 2, 68 - reached], [70]], 70).slice(2, 70)
    inputs, *_ = draw(documents, "beta", "token", heads=1, groups=1, keys=4, values=3)
    (inputs,) = on(DEVICE, inputs)
    single = tuple(x if x is None else x.float() for x in inputs)
    expected = recurrence.begin(inputs, documents, backend="reference")
    found = recurrence.begin(single, documents, backend="triton")
    assert_near([found.out, *found.summary, found.reads], [expected.out, *expected.summary, expected.reads], 1e-4)
    assert not found.summary.transition[0].any()
    assert not found.reads[0, reached:].any()
    assert found.reads[1, -1].any()  # the other row goes through: it alone reaches so far
    alone = documents.rows(0, 1)
    found = recurrence.begin(tuple(x if x is None else x[:1] for x in single), alone, backend="triton")
    assert_near([*found.summary, found.reads], [x[:1] for x in (*expected.summary, expected.reads)], 1e-4)


def test_padding_and_a_state_of_a_row_that_does_not_go_on():
    documents = Documents.from_lengths([[3], []], 4)
    inputs, state, *_ = draw(documents, "beta", "token", heads=1, groups=1, keys=3, values=2)
    state[:] = torch.nan
    inputs, (state,) = on(DEVICE, inputs, (state,))
    single = [x if x is None else x.float() for x in inputs]
    out, final = call(single, initial_state=state.float(), documents=documents, backend="triton")
    assert bool(out.isfinite().all())
    assert not out[0, 3:].any()
    assert not out[1].any()
    assert not final.any()


def test_what_the_kernels_do_not_take_is_refused():
    documents = Documents.whole(1, 4)
    inputs, *_ = draw(documents, "beta", "none", heads=1, groups=1)
    with pytest.raises(ValueError, match="float64"):
        call(inputs, backend="triton")
    x = torch.zeros(1, 4, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="key dim must be at most 256 with backend 'triton'; got 257"):
        delta_rule(x, x, x, backend="triton")


def test_every_kernel_is_compiled_ahead_of_time_in_some_production_shape():
    listed = {c.kernel.fn.__name__ for c in kernels.compilations()}
    own = {name for name, x in vars(kernels).items() if hasattr(x, "arg_names") and _has_programs(x)}
    assert listed == {name for name in own if getattr(kernels, name).fn.__module__ == kernels.__name__}


def _has_programs(kernel):
    import inspect

    return "program_id" in inspect.getsource(kernel.fn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("rule", "decay"), CASES)
def test_bfloat16_at_real_sizes(rule, decay, dim):
    documents = Documents.from_lengths([[700, 1, 323], [1024]], 1024).slice(10, 1024)
    found, expected = both(documents, rule, decay, torch.bfloat16, heads=4, groups=2, keys=dim, values=dim)
    assert_close_in_norm(found, expected, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_are_bitwise_the_same():
    documents = Documents.whole(2, 1000)
    inputs, *_ = draw(documents, "beta", "channel", heads=4, keys=64, values=64)
    single = [x if x is None else x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs]
    results = []
    for _ in range(2):
        out, final = call(single)
        results.append([out, final, *torch.autograd.grad(out.float().sum(), [x for x in single if x is not None])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
