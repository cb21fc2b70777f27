"""A recurrence and an attention op written outside the project: on ranks, packed, recomputed, decoded, in the doctor.

The attention op is among the cases of `test_ops.py` too.
"""

import copy

import pytest
import torch
from distributed import run_threads
from own_recurrence import Rotation, RotationInputs, agree_on_rotation

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.models.decoding import next_logits
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategies.attention import SharedAttention
from longreach.trainer.diagnosis.bench import Bench
from longreach.trainer.diagnosis.checks import exact, inexact
from longreach.trainer.diagnosis.report import PASS, Report
from longreach.trainer.diagnosis.work import Topology
from longreach.trainer.settings import ParallelSettings

LENGTH = 48
PACKINGS = [((7, 20, 1, 15, 5), (LENGTH,)), ((3, 2), (*[1] * 10, 30))]
MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "vocabulary": 61,
    "width": 16,
    "depth": 2,
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 16},
}
MIXERS = {
    "recurrent": {"_target_": "own_recurrence.Rotating", "_partial_": True, "channels": 8},
    "attention": {"_target_": "own_attention.Biasing", "_partial_": True, "heads": 2},
}


@pytest.mark.parametrize(
    ("strategy", "spans", "keep"), [("default", 2, False), ("default", 1, True), ("ulysses", 2, True)]
)
def test_ranks_agree_with_one(strategy, spans, keep):
    run_threads(2, agree_on_rotation, PACKINGS, LENGTH, spans, strategy, keep)


def test_it_is_differentiable_on_one_device():
    torch.manual_seed(0)
    x, decay, angle, state = (torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_() for _ in range(4))
    documents = Documents.from_lengths([[2, 3], [4]], 5).slice(1, 5)

    def op(*tensors):
        *inputs, entering = tensors
        return Rotation()(RotationInputs(*inputs), entering, documents)

    inputs = [x[:, 1:], -decay[:, 1:].abs(), angle[:, 1:], state[:, :3, :2]]
    assert torch.autograd.gradcheck(op, [tensor.detach().requires_grad_() for tensor in inputs])


def test_inputs_that_do_not_fit_are_named():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"angle must be \[B, T, D\] = \[2, 5, 3\]; got \[2, 4, 3\]"):
        Rotation()(RotationInputs(x, x, x[:, 1:]))
    with pytest.raises(ValueError, match="log_decay must not be positive"):
        Rotation()(RotationInputs(x, x + 1, x))


def test_gradients_that_an_op_returns_twice_are_added_up_apart():
    one, total = torch.ones(2), {}
    for _ in range(2):  # as of two parts of the keys
        SharedAttention.add_up(total, {"q": one, "bias": one})
    assert [total[name].tolist() for name in ("q", "bias")] == [[2.0, 2.0]] * 2
    assert one.tolist() == [1.0, 1.0]


def settings_of(kind):
    return {**copy.deepcopy(MODEL), "pattern": ["own"], "mixers": {"own": MIXERS[kind]}}


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_full_forward(kind):
    model, tokens, cache = build(settings_of(kind)).double(), torch.randint(61, (2, 12)), DecodingCache()
    model.initialise(0)
    expected = model(tokens, Sequence.single(Documents.whole(2, 12)))
    for start, stop in [(0, 3), *((t, t + 1) for t in range(3, 12))]:
        actual = next_logits(model, tokens[:, start:stop], cache)
        torch.testing.assert_close(actual, expected[:, stop - 1], atol=1e-9, rtol=1e-9)


STRATEGIES = [("recurrent", "state_passing"), ("recurrent", "ulysses"), ("attention", "ring"), ("attention", "gather")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), STRATEGIES)
def test_the_doctor_passes_it(kind, strategy):
    parallel = ParallelSettings(sequence=2, **{kind: strategy})
    report = Report("")
    bench = Bench(Topology(build, settings_of(kind), parallel), 1, report, None)
    try:
        exact.one_process(bench)
        exact.operations(bench)
        exact.model(bench)
        exact.leaks(bench)
        exact.recomputation(bench, "none")
        exact.decoding(bench)
        inexact.rounded(bench, torch.bfloat16)
    finally:
        bench.close()
    assert {row.check for row in report.rows} >= {f"op {kind}", "decoding = forward"}
    assert all(row.verdict == PASS for row in report.rows), [row for row in report.rows if row.verdict != PASS]
