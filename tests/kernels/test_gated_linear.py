"""Gated linear attention against its recurrence and other people's code: op, gradients, parts, segments of a row."""

import copy
from functools import partial

import pytest
import recurrence_checks as check
import torch
from covering import pairwise, slow_but
from definitions import definitions_of
from largest_tensor import LargestTensor
from recurrence_parts import CUTS, OFTEN, PACKINGS, ROWS, Parts, assert_near, nan_in_fresh_memory, run_op

from longreach.kernels.chunks.decay import FLOOR
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import GatedLinearRecurrence, flops, gated_linear_attention, shared
from longreach.kernels.recurrence import Summary

DECAYS = ("none", "constant", "token", "channel")
STRENGTHS = {"none": ("none", 0.0)} | {
    f"{decay}, {name}": (decay, strength)
    for decay in DECAYS[1:]
    for name, strength in {"mild": 0.1, "-20 a step": 20.0}.items()
}


def draw(documents, decay, strength=0.1, heads=4, query_groups=4, key_groups=4, keys=6, values=10):
    """(q, k, v, log_decay), initial state, and gradients of the output and of the final state, in float64."""
    torch.manual_seed(0)
    batch, length = documents.batch, documents.length
    shapes = {"constant": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, keys)}
    # Decays of all sizes: what is decayed little comes after what is decayed much.
    log_decay = None if decay == "none" else -strength * torch.rand(shapes[decay], dtype=torch.float64) ** 4
    q, k, v, state, dout, dstate = (
        torch.randn(shape, dtype=torch.float64)
        for shape in (
            (batch, length, query_groups, keys),
            (batch, length, key_groups, keys),
            (batch, length, heads, values),
            (batch, heads, keys, values),
            (batch, length, heads, values),
            (batch, heads, keys, values),
        )
    )
    return (q, k, v, log_decay), state, dout, dstate


run = partial(run_op, gated_linear_attention)


@pytest.mark.parametrize(("decay", "documents"), pairwise(STRENGTHS, PACKINGS, often=OFTEN))
def test_outputs_states_and_gradients_are_those_of_the_recurrence(decay, documents):
    inputs, state, *given = draw(documents, *decay)
    expected = run(inputs, state, documents, *given, backend="reference")
    with nan_in_fresh_memory():
        assert_near(run(inputs, state, documents, *given), expected, 1e-9)
        assert_near(run(inputs, state, documents, *given, dtype=torch.float32), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.slow
def test_chunks_that_decay_just_above_and_just_below_the_floor(channels, dtype):
    """Queries and keys are scaled by as much as their type holds, or a matrix of decays is made: both are exact."""
    documents = Documents.whole(1, 1024)
    (q, k, v, _), state, *given = draw(documents, "none")
    floor = FLOOR[dtype]
    each = torch.tensor([[0.001, 0.5, 0.999, 0.2], [1.001, 0.999, 4.0, 0.1]], dtype=torch.float64) * floor / 64
    of_slabs = each.repeat_interleave(2, dim=1).flatten()  # 8 chunks of 4 heads a slab
    log_decay = of_slabs.repeat_interleave(64).view(1, -1, 1) * torch.tensor([1.0, 0.3, 0.1, 1.0])
    if channels > 1:
        log_decay = log_decay.unsqueeze(-1) * torch.linspace(0.1, 2.0, channels, dtype=torch.float64)
    inputs = q, k, v, log_decay
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given, dtype=dtype), expected, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("decay", ["constant", "channel"])
@pytest.mark.slow
def test_a_thousand_tokens(decay):
    documents = Documents.whole(1, 1000)
    inputs, state, *given = draw(documents, decay, heads=2, query_groups=1, key_groups=2)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.slow
def test_the_recurrence_passes_gradcheck(decay):
    documents = Documents.from_lengths([[3, 2], [4]], 5)
    inputs, state, *_ = draw(documents, decay, heads=2, query_groups=1, key_groups=1, keys=2, values=3)
    leaves = [x.clamp(max=-1e-3) if x is inputs[3] else x for x in (*inputs, state) if x is not None]
    leaves = [x.requires_grad_() for x in leaves]

    def op(q, k, v, *rest):
        log_decay = rest[0] if len(rest) == 2 else None
        return gated_linear_attention(
            q, k, v, log_decay, initial_state=rest[-1], documents=documents.slice(1, 5), backend="reference"
        )

    leaves[:3] = [x.detach()[:, 1:].requires_grad_() for x in leaves[:3]]
    if decay in ("token", "channel"):
        leaves[3] = leaves[3].detach()[:, 1:].requires_grad_()
    assert torch.autograd.gradcheck(op, leaves)


GROUPINGS = {"both grouped": (2, 2), "one key group": (4, 1), "one group": (1, 1), "queries grouped": (2, 4)}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("decay", ["constant", "channel"])
def test_grouped_heads(decay, groups):
    documents = PACKINGS["packed"]
    inputs, state, *given = draw(documents, decay, query_groups=groups[0], key_groups=groups[1])
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0], ids=["mild", "within twice the floor", "strong"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_heads_that_share_queries_and_keys(dtype, strength, groups, monkeypatch):
    monkeypatch.setattr(shared, "KEPT", 1)  # the states of one chunk at once
    for documents in (PACKINGS["packed"], Documents.whole(2, 150, position=3)):
        inputs, state, *given = draw(documents, "token", strength, query_groups=groups, key_groups=groups)
        expected = run(inputs, state, documents, *given, backend="reference")
        with nan_in_fresh_memory():
            found = run(inputs, state, documents, *given, dtype=dtype)
        assert_near(found, expected, 1e-9 if dtype == torch.float64 else 1e-4)


MANY_LANES = {"heads in blocks": (1, 48, 48), "one group": (1, 40, 1), "rows in blocks": (5, 16, 8)}


@pytest.mark.parametrize("sizes", MANY_LANES.values(), ids=MANY_LANES)
@pytest.mark.parametrize("decay", ["constant", "token", "channel"])
def test_more_lanes_than_a_slab_holds(decay, sizes):
    rows, heads, groups = sizes
    documents = Documents.from_lengths([[40 + row, 30 - row] for row in range(rows)], 75)
    inputs, state, *given = draw(documents, decay, heads=heads, query_groups=heads, key_groups=groups, keys=3, values=2)
    expected = run(inputs, state, documents, *given, backend="reference")
    assert_near(run(inputs, state, documents, *given), expected, 1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_is_computed_in_float32(decay):
    inputs, state, *given = draw(PACKINGS["packed"], decay)
    check.bfloat16(gated_linear_attention, inputs, state, PACKINGS["packed"], *given)


@pytest.mark.parametrize("decay", DECAYS)
def test_strong_decay_neither_overflows_nor_forgets_the_present(decay):
    documents = Documents.whole(1, 200)
    inputs, state, *given = draw(documents, decay)
    if inputs[3] is not None:
        inputs = (*inputs[:3], torch.full_like(inputs[3], -20.0))
    found = run(inputs, state, documents, *given, dtype=torch.float32)
    assert_near(found, run(inputs, state, documents, *given, backend="reference"), 1e-4)


def test_decays_of_minus_infinity_forget_everything():
    inputs, _, *given = draw(PACKINGS["63 tokens"], "channel")
    q, k, v, log_decay = inputs
    found = run((q, k, v, torch.full_like(log_decay, -torch.inf)), None, PACKINGS["63 tokens"], *given)
    only_now = q.shape[-1] ** -0.5 * (q * k).sum(-1, keepdim=True) * v
    assert_near(found[:1], [only_now], 1e-9)
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_document_moves_another(decay):
    drawn, same = partial(draw, decay=decay, strength=1e-3), (0, 2, 3, 4)  # out, dq, dk, dv
    check.no_document_moves_another(gated_linear_attention, drawn, [0, 1, 2], same)


def test_a_state_enters_only_where_a_document_goes_on():
    check.where_a_state_enters(gated_linear_attention, partial(draw, decay="token"))


@pytest.mark.parametrize("decay", DECAYS)
def test_token_by_token_is_the_whole(decay):
    inputs, *_ = draw(Documents.whole(2, 37), decay)
    check.token_by_token(gated_linear_attention, inputs)


recurrence = Parts(GatedLinearRecurrence())


@pytest.mark.parametrize("cuts", slow_but(["5"], CUTS))
@pytest.mark.parametrize("decay", DECAYS)
def test_segments_put_together_are_the_whole_row(decay, cuts):
    inputs, _, *given = draw(ROWS, decay)
    check.segments(recurrence, inputs, *given, run(inputs, None, ROWS, *given), ROWS, cuts)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_backward_given_a_state_and_the_gradient_of_the_last(backend):
    documents = PACKINGS["cut from rows"]
    inputs, state, dout, dstate = draw(documents, "channel")
    expected = run(inputs, state, documents, dout, dstate, backend="reference")
    gradients, dinitial = recurrence.backward(dout, dstate, inputs, state, documents, backend=backend)
    assert_near([*(x for x in gradients if x is not None), dinitial], expected[2:], 1e-9)


def test_transitions_are_zero_unless_one_document_goes_through():
    inputs, state, *_ = draw(ROWS, "channel")
    summary = recurrence.summarize(inputs, state, ROWS)
    assert not summary.transition.any()  # every row starts a document
    held = ROWS.slice(160, 300)
    cut = tuple(x[:, 160:300] for x in inputs)
    transition = recurrence.summarize(cut, state, held).transition
    assert [bool(row.any()) for row in transition] == [True, True, False, True]
    torch.testing.assert_close(transition[0, :, :, 0], inputs[3][0, 160:300].sum(0).exp())


def test_combining_is_associative():
    torch.manual_seed(0)
    a, b, c = (
        Summary(torch.rand(2, 3, 4, 1, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64))
        for _ in range(3)
    )
    left = recurrence.combine(recurrence.combine(c, b), a)
    right = recurrence.combine(c, recurrence.combine(b, a))
    assert_near(left, right, 1e-12)


def test_gradients_come_through_the_final_state_alone():
    documents = PACKINGS["packed"]
    inputs, _, dout, dstate = draw(documents, "token")
    found = run(inputs, None, documents, torch.zeros_like(dout), dstate)
    leaves = [x.clone().requires_grad_() for x in inputs]
    _, final = gated_linear_attention(*leaves, documents=documents)
    gradients = torch.autograd.grad(final, leaves[1:], dstate)
    assert_near(gradients, found[3:], 1e-12)


def test_no_tensor_is_larger_than_an_input():
    documents = Documents.from_lengths([[3000, 1096]])
    torch.manual_seed(0)
    q, k, v, log_decay = (torch.randn(1, 4096, heads, 16, requires_grad=True) for heads in (2, 2, 8, 8))
    with LargestTensor() as largest:
        out, _ = gated_linear_attention(q, k, v, -log_decay.exp(), documents=documents)
        out.sum().backward()
    assert largest.numel <= v.numel()


@pytest.mark.slow
def test_constant_decay_is_lightning_attention_of_minimax():
    modeling = definitions_of("minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=24, num_attention_heads=4, head_dim=6, num_hidden_layers=2, block_size=32,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx=0).double()
    x = torch.randn(2, 75, 24, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    q, k, v = torch.nn.functional.silu(ours.qkv_proj(x)).unflatten(-1, (4, 18)).split(6, dim=-1)
    out, state = gated_linear_attention(q, k, v, -theirs.slope_rate.double().flatten(), scale=1.0)
    out = ours.out_proj(torch.sigmoid(ours.output_gate(x)) * ours.norm(out.flatten(-2)))
    expected, expected_state = theirs(x, None, None)
    # Their decay factors are computed in float32.
    assert_near([out, state], [expected, expected_state], 1e-6)


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
@pytest.mark.slow
def test_flash_linear_attention_agrees(decay):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed; it is an oracle here and nothing else")
    (q, k, v, log_decay), state, *_ = draw(Documents.whole(2, 150, position=1), decay)
    q, k, v, state = q.float(), k.float(), v.float(), state.float()
    if decay == "none":
        from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

        expected, final = naive_recurrent_linear_attn(
            q, k, v, initial_state=state, output_final_state=True, normalize=False
        )
    elif decay == "token":
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

        expected, final = naive_recurrent_simple_gla(
            q, k, v, log_decay.float(), initial_state=state, output_final_state=True
        )
    else:
        from fla.ops.gla.naive import naive_recurrent_gla

        expected, final = naive_recurrent_gla(q, k, v, log_decay.float(), initial_state=state, output_final_state=True)
    out, found = gated_linear_attention(
        q, k, v, log_decay if log_decay is None else log_decay.float(), initial_state=state
    )
    assert_near([out, found], [expected, final], 1e-4)


WRONG = {
    "q must be": lambda q, k, v, g: gated_linear_attention(q[..., :3, :], k, v, g),
    "k must be": lambda q, k, v, g: gated_linear_attention(q, k[0], v, g),
    "log_decay must be": lambda q, k, v, g: gated_linear_attention(q, k, v, g[:, :3]),
    "log_decay must not be positive": lambda q, k, v, g: gated_linear_attention(q, k, v, -g),
    "initial_state must": lambda q, k, v, g: gated_linear_attention(q, k, v, g, initial_state=v),
    "documents must describe": lambda q, k, v, g: gated_linear_attention(q, k, v, g, documents=Documents.whole(2, 5)),
    "documents must start at position 0": lambda q, k, v, g: gated_linear_attention(
        q, k, v, g, documents=Documents.concatenate([Documents.whole(2, 10), Documents.whole(2, 10, position=50)])
    ),
    "at least one token": lambda q, k, v, g: gated_linear_attention(q[:, :0], k[:, :0], v[:, :0]),
    "backend must": lambda q, k, v, g: gated_linear_attention(q, k, v, g, backend="fast"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    inputs, *_ = draw(Documents.whole(2, 20), "token")
    with pytest.raises(ValueError, match=message):
        WRONG[message](*inputs)


def test_costs():
    assert flops(10, heads=2, key_dim=3, value_dim=5, chunk=8) == 10 * 2 * (4 * 15 + 2 * 8 * 8)
    k, v, log_decay = torch.rand(2, 7, 3, 4), torch.rand(2, 7, 3, 5), -torch.rand(2, 7, 3)
    op, inputs = GatedLinearRecurrence(), (k, k, v, log_decay)
    assert op.state_bytes(inputs) == 2 * 3 * 4 * 5 * 4
    assert op.bytes_sent(inputs, ranks=1) == 0
    assert op.bytes_sent(inputs, ranks=3) == 2 * 2 * 3 * (20 + 1 + 20) * 4
    assert op.bytes_sent((k, k, v, -k), ranks=3) == 2 * 2 * 3 * (20 + 4 + 20) * 4
