"""Variants of gated linear attention: value decays, exclusive reads, normalisers, exponential input gates."""

from functools import partial

import pytest
import torch
from covering import pairwise
from definitions import definitions_of
from recurrence_parts import OFTEN, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import GatedLinearRecurrence, gated_linear_attention

HEADS, KEYS, VALUES = 4, 6, 10
PACKINGS = {
    "1 token": Documents.whole(2, 1),
    "continued": Documents.whole(2, 70, position=9),
    "packed": Documents.from_lengths([[5, 1, 1, 64, 50], [70, 40], [90]], 121),
    "cut from rows": Documents.from_lengths([[5, 1, 1, 64, 100, 29], [300], [30, 270]], 300).slice(40, 150),
    "all padding": Documents.from_lengths([[7], []], 7),
}
# Settings, and the last dims of the decay of keys: "H" and "HK" are constants, "BTH" and "BTHK" of each token.
VARIANTS = {
    "constant channel decay": ({}, "HK"),
    "value decay": ({"value_log_decay": True}, None),
    "value and scalar decay": ({"value_log_decay": True}, "BTH"),
    "value and channel decay": ({"value_log_decay": True}, "BTHK"),
    "exclusive": ({"read": "exclusive"}, "BTH"),
    "bonus, no decay": ({"read": "exclusive", "bonus": True}, None),
    "bonus, constant": ({"read": "exclusive", "bonus": True}, "HK"),
    "bonus, channel": ({"read": "exclusive", "bonus": True}, "BTHK"),
    "bonus, both decays": ({"read": "exclusive", "bonus": True, "value_log_decay": True}, "BTHK"),
    "sum": ({"normaliser": "sum"}, None),
    "sum, channel": ({"normaliser": "sum"}, "BTHK"),
    "at least one": ({"normaliser": "at_least_one"}, "H"),
    "sum, bonus": ({"normaliser": "sum", "read": "exclusive", "bonus": True}, "BTH"),
    "input, undecayed": ({"normaliser": "sum", "log_input": True}, None),
    "input, constant": ({"normaliser": "sum", "log_input": True}, "H"),
    "input": ({"normaliser": "at_least_one", "log_input": True}, "BTH"),
    "input, exclusive": ({"normaliser": "sum", "log_input": True, "read": "exclusive"}, "BTH"),
    "input, bonus": ({"normaliser": "sum", "log_input": True, "read": "exclusive", "bonus": True}, "BTH"),
    "input, bonus, constant": (
        {"normaliser": "at_least_one", "log_input": True, "read": "exclusive", "bonus": True},
        "H",
    ),
}
NAMES = ("q", "k", "v", "log_decay", "value_log_decay", "bonus", "log_input")


def draw(documents, variant, strength=0.1, groups=HEADS, heads=HEADS, keys=KEYS, values=VALUES):
    """The op's object, its inputs, an initial state, gradients of the output and of the final state; in float64."""
    torch.manual_seed(0)
    settings, decay = VARIANTS[variant]
    variables = {"B": documents.batch, "T": documents.length, "H": heads, "K": keys, "V": values}

    def decays(dims):
        shape = [variables[dim] for dim in dims]
        return -strength * torch.rand(shape, dtype=torch.float64) ** 4

    q, k = (torch.randn(documents.batch, documents.length, groups, keys, dtype=torch.float64) for _ in "qk")
    if "log_input" in settings or settings.get("normaliser") == "sum":
        q, k = q.abs() + 0.1, k.abs() + 0.1  # for sums that are not near 0
    v = torch.randn(documents.batch, documents.length, heads, values, dtype=torch.float64)
    inputs = (
        q,
        k,
        v,
        None if decay is None else decays(decay),
        decays("BTHV") if "value_log_decay" in settings else None,
        torch.rand(heads, keys, dtype=torch.float64) if "bonus" in settings else None,
        4 * torch.randn(v.shape[:3], dtype=torch.float64) - 2 if "log_input" in settings else None,
    )
    op = Parts(
        GatedLinearRecurrence(settings.get("read", "inclusive"), settings.get("normaliser"), "log_input" in settings)
    )
    state = torch.rand(
        documents.batch, heads, keys + op.stabilised, values + (op.normaliser is not None), dtype=torch.float64
    )
    dfinal = torch.randn_like(state)
    if op.stabilised:
        state[:, :, -1] = 3 * torch.randn(documents.batch, heads, 1, dtype=torch.float64)
    return op, inputs, state, torch.randn_like(v), dfinal


def attend(op, *inputs, **settings):
    """The public op."""
    tensors = dict(zip(NAMES, inputs, strict=True))
    vectors = [tensors.pop(name) for name in "qkv"]
    return gated_linear_attention(*vectors, **tensors, read=op.read, normaliser=op.normaliser, **settings)


def run(op, *given, **settings):
    """Output, final state and all gradients by the public op."""
    return run_op(partial(attend, op), *given, **settings)


@pytest.mark.parametrize(
    ("variant", "documents", "strength"), pairwise(list(VARIANTS), PACKINGS, (0.1, 20.0), often=OFTEN)
)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(variant, documents, strength):
    op, inputs, state, *given = draw(documents, variant, strength)
    expected = run(op, inputs, state, documents, *given, backend="reference")
    assert all(bool(x.isfinite().all()) for x in expected)
    with nan_in_fresh_memory():
        assert_near(run(op, inputs, state, documents, *given), expected, 1e-9)
        assert_near(run(op, inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


@pytest.mark.parametrize("variant", ["value and scalar decay", "bonus, channel", "sum", "input", "input, bonus"])
def test_grouped_heads(variant):
    op, inputs, state, *given = draw(PACKINGS["packed"], variant, groups=2)
    expected = run(op, inputs, state, PACKINGS["packed"], *given, backend="reference")
    assert_near(run(op, inputs, state, PACKINGS["packed"], *given), expected, 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_the_recurrence_passes_gradcheck(variant):
    """All but final states that are relative to a scale: with the scale for a constant, theirs is not the whole one."""
    documents = Documents.from_lengths([[3, 2], [4]], 5).slice(1, 5)
    op, inputs, state, *_ = draw(documents, variant, heads=2, groups=1, keys=2, values=3)
    if op.stabilised:
        state[:, :, -1] = 0.0
    present = [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]
    leaves = [x.clone() for x in inputs if x is not None]
    leaves = [x.clamp(max=-1e-3) if "decay" in name else x for name, x in zip(present, leaves, strict=True)]
    held = state[:, :, :-1] if op.stabilised else state

    def call(*tensors):
        given = dict(zip(present, tensors[:-1], strict=True))
        vectors = [given.pop(name) for name in "qkv"]
        entering = torch.cat([tensors[-1], state[:, :, -1:]], 2) if op.stabilised else tensors[-1]
        out, final = gated_linear_attention(
            *vectors, **given, read=op.read, normaliser=op.normaliser, initial_state=entering, documents=documents,
            backend="reference",
        )  # fmt: skip
        return out if op.stabilised else (out, final)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (*leaves, held)])


ROWS = Documents.from_lengths([[150], [50, 25, 75], [30, 1, 1, 60, 20], [75, 75]], 150)
CUTS = [(1, 50, 75, 92, 150), (75, 150), (30, 91, 150)]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_put_together_are_the_whole_row(variant, cuts):
    op, inputs, state, dout, _ = draw(ROWS, variant)
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    raw, _ = op.forward(tuple(inputs), None, ROWS)
    whole = op.finish(raw, torch.float64)
    out, _ = attend(op, *leaves, documents=ROWS, backend="reference")
    expected = torch.autograd.grad(out, [x for x in leaves if x is not None], dout)
    assert_near([out], [whole], 1e-12)

    bounds = list(zip((0, *cuts[:-1]), cuts, strict=True))
    segments = [tuple(x if x is None or x.dim() < 3 else x[:, a:b] for x in inputs) for a, b in bounds]
    documents = [ROWS.slice(a, b) for a, b in bounds]
    raws, summaries, states = [], [], [op.zero_state(torch.zeros_like(state))]
    for segment, held in zip(segments, documents, strict=True):
        raw, final = op.forward(segment, None, held)
        summaries.append(op.summarize(segment, final, held))
        raws.append(op.correct(raw, segment, states[-1], held))
        alone, final = op.forward(segment, states[-1], held)
        assert_near([op.finish(raws[-1], torch.float64)], [op.finish(alone, torch.float64)], 1e-9)
        states.append(op.advance(summaries[-1], states[-1]))
        assert_near([states[-1]], [final], 1e-9)
    finished = torch.cat([op.finish(raw, torch.float64) for raw in raws], 1)
    assert_near([finished], [whole], 1e-9)

    total = summaries[0]
    for summary in summaries[1:]:
        total = op.combine(summary, total)
    assert_near([op.advance(total, states[0])], [states[-1]], 1e-9)

    draws = []
    for (a, b), raw in zip(bounds, raws, strict=True):
        leaf = raw.detach().requires_grad_()
        finish = op.finish(leaf, torch.float64)
        draws.append(torch.autograd.grad(finish, leaf, dout[:, a:b])[0] if finish is not leaf else dout[:, a:b])
    dstate, parts = torch.zeros_like(state), []
    for number in reversed(range(len(segments))):
        given = segments[number], states[number], documents[number]
        gradients, dinitial = op.backward(draws[number], dstate, *given)
        local = op.summarize_backward(draws[number], *given)
        dstate = op.retreat(summaries[number], dstate, local)
        assert_near([dstate], [dinitial], 1e-9)
        parts.insert(0, gradients)
    joined = [
        torch.cat(each, 1) if inputs[n].dim() > 2 else sum(each)
        for n, each in enumerate(zip(*parts, strict=True))
        if inputs[n] is not None
    ]
    assert_near(joined, expected, 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_foretold(variant):
    documents = Documents.whole(2, 7, position=3)
    op, inputs, state, *_ = draw(documents, variant)
    out, final = op.forward(inputs, state, documents)
    transition = op.summarize(inputs, final, documents).transition
    for found, said in zip((out, final, transition), op.empty_results(inputs)[:3], strict=True):
        assert (found.shape, found.dtype) == (said.shape, said.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_is_the_whole(variant):
    documents = Documents.whole(2, 17)
    op, inputs, *_ = draw(documents, variant)
    whole, final = attend(op, *inputs, documents=documents, backend="reference")
    state, steps = None, []
    for t in range(17):
        now = tuple(x if x is None or x.dim() < 3 else x[:, t : t + 1] for x in inputs)
        raw, state = op.forward(now, state, Documents.whole(2, 1, position=t))
        steps.append(op.finish(raw, torch.float64))
    assert_near([torch.cat(steps, 1), state], [whole, final], 1e-9)


@pytest.mark.parametrize("size", [40.0, 400.0, -400.0])
def test_input_gates_of_any_size(size):
    """As the same gates about 0, where the divisor is a sum: it does not know their scale."""
    documents = PACKINGS["packed"]
    op, inputs, _, dout, dfinal = draw(documents, "input, exclusive")
    moved = (*inputs[:6], inputs[6] + size)
    found = run(op, moved, None, documents, dout, torch.zeros_like(dfinal), dtype=torch.float32)
    expected = run(op, inputs, None, documents, dout, torch.zeros_like(dfinal))
    assert_near([found[0], *found[2:]], [expected[0], *expected[2:]], 2e-3)


def test_nothing_read_is_nothing():
    """Keys of 0, and the first token of an exclusive read: no division by 0, in the gradients neither."""
    documents = PACKINGS["packed"]
    for variant in ("sum", "at least one", "sum, bonus", "input", "input, exclusive"):
        op, inputs, _, *given = draw(documents, variant)
        inputs = (inputs[0], torch.zeros_like(inputs[1]), *inputs[2:])
        found = run(op, inputs, None, documents, *given, dtype=torch.float32)
        assert not found[0].any()
        assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.slow
def test_bfloat16_is_computed_in_float32():
    documents = PACKINGS["packed"]
    for variant in VARIANTS:
        op, inputs, _, *given = draw(documents, variant)
        rounded = tuple(x if x is None else x.bfloat16() for x in inputs)
        exact = tuple(x if x is None else x.double() for x in rounded)
        given[0] = given[0].bfloat16()
        expected = run(op, exact, None, documents, given[0].double(), given[1], backend="reference")
        found = run(op, rounded, None, documents, *given, dtype=torch.bfloat16)
        assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() <= 2e-2 * b.norm(), variant


@pytest.mark.slow  # flash-linear-attention takes seconds to import
def test_flash_linear_attention_agrees_on_rwkv6():
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive", reason="flash-linear-attention is an oracle")
    _, (q, k, v, log_decay, _, bonus, _), state, *_ = draw(Documents.whole(2, 80, position=1), "bonus, channel")
    heads_first = [x.float().transpose(1, 2) for x in (q, k, v, log_decay)]
    expected, final = naive.naive_recurrent_rwkv6(
        *heads_first, bonus.float(), initial_state=state.float(), output_final_state=True
    )
    found = gated_linear_attention(q, k, v, log_decay, bonus=bonus, read="exclusive", initial_state=state)
    assert_near(found, [expected.transpose(1, 2), final], 1e-4)


@pytest.mark.slow  # flash-linear-attention takes seconds to import
def test_flash_linear_attention_agrees_on_the_normaliser():
    naive = pytest.importorskip("fla.ops.linear_attn.naive", reason="flash-linear-attention is an oracle")
    _, (q, k, v, *_), *_ = draw(Documents.whole(2, 80), "sum")
    expected, _ = naive.naive_recurrent_linear_attn(q.float(), k.float(), v.float(), normalize=True)
    out, _ = gated_linear_attention(q, k, v, normaliser="sum")
    assert_near([out], [expected], 1e-4)


def test_rwkv_4_is_a_variant():
    """Against transformers' loop: heads of one channel, keys as input gates, e^u as the bonus."""
    modeling = definitions_of("rwkv")
    torch.manual_seed(0)
    channels, length = 5, 40
    w, u = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    k, v = (3 * torch.randn(2, length, channels, dtype=torch.float64) for _ in "kv")
    expected, _ = modeling.rwkv_linear_attention_cpu(w, u, k, v)
    ones = torch.ones_like(v)[..., None]
    out, _ = gated_linear_attention(
        ones, ones, v[..., None], -w.exp(), log_input=k, read="exclusive", bonus=u.exp()[:, None], normaliser="sum",
        scale=1.0,
    )  # fmt: skip
    assert_near([out[..., 0]], [expected], 1e-6)


def test_aft_simple_is_a_variant():
    torch.manual_seed(0)
    k, v = (3 * torch.randn(2, 40, 5, dtype=torch.float64) for _ in "kv")
    expected = (k.exp() * v).cumsum(1) / k.exp().cumsum(1)
    ones = torch.ones_like(v)[..., None]
    out, _ = gated_linear_attention(ones, ones, v[..., None], log_input=k, normaliser="sum", scale=1.0)
    assert_near([out[..., 0]], [expected], 1e-12)


def test_mlstm_of_transformers():
    modeling = definitions_of("xlstm")
    _, inputs, *_ = draw(Documents.whole(2, 64), "input")
    q, k, v, log_decay, _, _, log_input = inputs
    forget = -torch.log(torch.expm1(-log_decay.clamp(max=-1e-6)))  # whose logsigmoid is the decay
    heads_first = [x.float().transpose(1, 2) for x in (q, k, v, log_input, forget)]
    query, key, value, gate, forget = heads_first
    expected = modeling.mlstm_recurrent_sequence_native(query, key, value, gate, forget)
    expected = expected[0] if isinstance(expected, tuple) else expected
    out, _ = gated_linear_attention(q, k, v, log_decay.clamp(max=-1e-6), log_input=log_input, normaliser="at_least_one")
    assert_near([out], [expected.transpose(1, 2)], 1e-3)  # they add 1e-6 to the divisor


def call(documents=None, **given):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 20, 2, n) for n in (3, 3, 5))
    return gated_linear_attention(q, k, v, documents=documents, **given)


WRONG = {
    "read must": {"read": "both"},
    "normaliser must be one of": {"normaliser": "mean"},
    r"bonus must be \[H, K\]": {"bonus": torch.ones(3, 3), "read": "exclusive"},
    "bonus must come with read='exclusive'": {"bonus": torch.ones(2, 3)},
    "value_log_decay must be": {"value_log_decay": -torch.ones(2, 20, 2, 3)},
    "value_log_decay must not be positive": {"value_log_decay": torch.ones(2, 20, 2, 5)},
    "normaliser must be None": {"value_log_decay": -torch.ones(2, 20, 2, 5), "normaliser": "sum"},
    "log_input must be": {"log_input": torch.ones(2, 20, 3), "normaliser": "sum"},
    "log_input must come with": {"log_input": torch.ones(2, 20, 2)},
    "log_input must come with a normaliser and": {
        "log_input": torch.ones(2, 20, 2), "normaliser": "sum", "log_decay": -torch.ones(2, 3)
    },
    r"initial_state must be \[B, H, K, V \+ 1\]": {"normaliser": "sum", "initial_state": torch.ones(2, 2, 3, 5)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        call(**WRONG[message])
