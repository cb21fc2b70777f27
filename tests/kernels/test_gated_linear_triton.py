"""Triton's gated linear attention against the recurrence in float64: interpreted, and on a GPU where there is one.

The interpreter takes milliseconds a step of a loop: shapes are small, and chunks shorter than in production.
"""

import pytest
import torch
from recurrence_parts import Parts

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import GatedLinearRecurrence
from longreach.kernels.gated_linear import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SHORT = Documents.from_lengths([[2, 1, 13]], 18).slice(1, 18)
TWO_CHUNKS = Documents.from_lengths([[3, 1, 1, 16, 6]], 28).slice(2, 27)
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "second token": Documents.whole(1, 1, position=1),
    "continued": Documents.whole(1, 33, position=9),
    "packed": Documents.from_lengths([[1, 30, 1, 1, 7], [32]], 41),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 34, 9], [50]], 50).slice(9, 48),
    "all padding": Documents.from_lengths([[7], []], 7),
}
# What else there is: (settings of the op, dims of log_decay); B T H K are its sizes.
VARIANTS = {
    "none": ({}, ""),
    "constant": ({}, "H"),
    "token": ({}, "BTH"),
    "channel": ({}, "BTHK"),
    "constant channel": ({}, "HK"),
    "value": ({"value_log_decay"}, "BTH"),
    "value and channel": ({"value_log_decay"}, "BTHK"),
    "bonus": ({"bonus"}, "BTH"),
    "normaliser": ({"normaliser"}, "BTH"),
    "input": ({"normaliser", "log_input"}, "BTH"),
    "input, bonus": ({"normaliser", "log_input", "bonus"}, "H"),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Chunks of which a test has several, more blocks than one a head, and memory that is NaN until it is written."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "CHUNK", 16)
        monkeypatch.setattr(kernels, "SUB", 8)
        monkeypatch.setattr(kernels, "BLOCK", 16)
        monkeypatch.setattr(kernels, "LANES", 16)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(documents, variant, *, dtype=torch.float32, heads=2, groups=None, keys=6, values=10, strength=0.3):
    """The op's object; inputs in `dtype`; initial state, and gradients of the output and of the final state."""
    torch.manual_seed(0)
    settings, decay = VARIANTS[variant]
    sizes = {"B": documents.batch, "T": documents.length, "H": heads, "G": groups or heads, "K": keys, "V": values}

    def normal(dims):
        return torch.randn([sizes[dim] for dim in dims])

    def decays(dims):
        return -strength * torch.rand([sizes[dim] for dim in dims]) ** 4

    q, k = normal("BTGK"), normal("BTGK")
    if "normaliser" in settings:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    inputs = (
        q, k, normal("BTHV"), decays(decay) if decay else None,
        decays("BTHV") if "value_log_decay" in settings else None,
        torch.rand(heads, keys) if "bonus" in settings else None,
        4 * normal("BTH") if "log_input" in settings else None,
    )  # fmt: skip
    read, normaliser = "exclusive" if "bonus" in settings else "inclusive", "sum" if "normaliser" in settings else None
    op = Parts(GatedLinearRecurrence(read, normaliser, "log_input" in settings))
    exact = (3, 4, 6)  # decays and gates are float32, as mixers give them
    inputs = tuple(
        x if x is None else x.to(DEVICE, torch.float32 if n in exact else dtype) for n, x in enumerate(inputs)
    )
    state, dfinal = torch.rand(2, documents.batch, heads, keys + op.stabilised, values + bool(normaliser)).to(DEVICE)
    return op, inputs, state, normal("BTHV").to(DEVICE, dtype), dfinal


def run(op, inputs, state, dout, dfinal, documents, backend):
    """Output, final state and the gradients of all inputs and of the initial state, by the parts of the op."""
    if backend == "reference":
        inputs, state = tuple(x if x is None else x.double() for x in inputs), state.double()
    raw, final = op.forward(inputs, state, documents, backend=backend)
    leaf = raw.detach().requires_grad_()
    out = op.finish(leaf, inputs[0].dtype)
    draw = torch.autograd.grad(out, leaf, dout.to(out.dtype))[0] if op.normaliser else dout.to(out.dtype)
    if op.stabilised:
        dfinal = torch.cat([dfinal[:, :, :-1], final[:, :, -1:].to(dfinal)], dim=2)
    found, dinitial = op.backward(draw, dfinal.to(final.dtype), inputs, state, documents, backend=backend)
    if op.stabilised:
        dinitial = dinitial[:, :, :-1]
    return [out.detach(), final, *(x for x in found if x is not None), dinitial]


def check(documents, variant, **sizes):
    op, inputs, state, dout, dfinal = draw(documents, variant, **sizes)
    found = run(op, inputs, state, dout, dfinal, documents, "triton")
    expected = run(op, inputs, state, dout, dfinal, documents, "reference")
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= TOLERANCES[inputs[0].dtype] * b.norm() + 1e-5, number


@pytest.mark.parametrize("documents", PACKINGS.values(), ids=PACKINGS)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(documents):
    check(documents, "token")


@pytest.mark.parametrize("variant", [name for name, (settings, dims) in VARIANTS.items() if "K" not in dims])
def test_every_variant(variant):
    sizes = {"heads": 1} if variant == "value" else {"heads": 2, "keys": 20}
    check(SHORT if variant == "value" else TWO_CHUNKS, variant, **sizes, values=6)


@pytest.mark.parametrize("variant", ["channel", "constant channel", "value and channel"])
def test_decays_by_channel(variant):
    check(SHORT if variant == "constant channel" else TWO_CHUNKS, variant, heads=1)


@pytest.mark.parametrize("variant", ["none", "token", "value and channel"])
def test_chunks_in_segments_side_by_side(variant, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_SEGMENT", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 2 if variant == "token" else 8)
    documents = Documents.from_lengths([[3, 40, 16]]).slice(2, 57)
    check(documents, variant, heads=1, keys=4, values=3)


def test_grouped_heads():
    check(TWO_CHUNKS, "token", heads=4, groups=2)
    check(Documents.whole(1, 9, position=2), "channel", heads=2, groups=1)


def test_strong_decays_neither_overflow_nor_forget_the_present():
    check(TWO_CHUNKS, "token", strength=20.0)
    check(SHORT, "channel", heads=1, strength=20.0)


def test_bfloat16(repaired_bf16):
    check(TWO_CHUNKS, "token", dtype=torch.bfloat16)
    check(TWO_CHUNKS, "normaliser", dtype=torch.bfloat16)
    check(SHORT, "channel", heads=1, dtype=torch.bfloat16)


@pytest.mark.parametrize("variant", ["token", "value and channel", "input, bonus"])
def test_segments_put_together_are_the_whole_row(variant):
    """`correct` and `summarize_backward` by kernels; the second segment goes on over its first chunk, or ends in it."""
    rows = [[5, 1, 30], [36]] if variant != "value and channel" else [[5, 1, 30]]
    documents = Documents.from_lengths(rows, 36)
    op, inputs, _, dout, _ = draw(documents, variant, heads=1)
    segments = [tuple(x if x is None or x.dim() < 3 else x[:, a:b] for x in inputs) for a, b in ((0, 16), (16, 36))]
    first, second = documents.slice(0, 16), documents.slice(16, 36)
    whole, _ = op.forward(inputs, None, documents)
    _, state = op.forward(segments[0], None, first)
    raw, _ = op.forward(segments[1], None, second, backend="triton")
    raw = op.correct(raw, segments[1], state, second, backend="triton")
    close(op.finish(raw, torch.float32), op.finish(whole, torch.float32)[:, 16:])
    dout = torch.randn(raw.shape, device=DEVICE)
    local = op.summarize_backward(dout, segments[1], state, second, backend="triton")
    expected = op.summarize_backward(dout.double(), doubled(segments[1]), state.double(), second, backend="chunked")
    close(local, expected)


def doubled(inputs):
    return tuple(x if x is None else x.double() for x in inputs)


def close(found, expected):
    assert (found.double() - expected.double()).norm() <= 1e-4 * expected.double().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dims", [(128, 128), (64, 96), (80, 64)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, variant, dims):
    sizes = {"dtype": dtype, "keys": dims[0], "values": dims[1]}
    check(Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048), variant, heads=4, groups=2, **sizes)
    check(Documents.whole(1, 1000, position=5), variant, heads=2, **sizes)
