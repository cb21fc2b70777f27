"""State passing's scan over segments, without processes: the states of the loop over all segments, in few calls."""

import math

import pytest
import torch
from own_recurrence import Rotation

from longreach.kernels.delta_rule import DeltaRecurrence
from longreach.kernels.gated_linear import GatedLinearRecurrence
from longreach.kernels.gated_linear.stable import pack
from longreach.kernels.recurrence import Summary
from longreach.parallel.layout import Layout
from longreach.parallel.strategies.stretches import LEVEL, scan, stretches

BATCH, HEADS, KEYS, VALUES = 2, 3, 4, 5
LAYOUTS = [*((ranks, spans) for ranks in (2, 3, 4, 8) for spans in (1, 2, 3)), (16, 1), (7, 5), (11, 4)]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def summaries_of(kind, count):
    """The op, and the summary of each segment; no state goes through the third one."""
    states = normal(count, BATCH, HEADS, KEYS, VALUES)
    if kind == "stabilised":
        transitions = -normal(count, BATCH, HEADS, 1, 1).abs()
        transitions[2::7] = -math.inf
        packed = [pack(state, 3 * normal(BATCH, HEADS), torch.float64) for state in states]
        return GatedLinearRecurrence(normaliser="sum", stabilised=True), Summary(transitions, torch.stack(packed))
    if kind == "matrix":
        op, transitions = DeltaRecurrence(), normal(count, BATCH, HEADS, KEYS, KEYS) / KEYS
    elif kind == "written outside":
        op, states, transitions = Rotation(), normal(count, BATCH, 8, 2), normal(count, BATCH, 8, 2) / 2
    else:
        op, transitions = GatedLinearRecurrence(), normal(count, BATCH, HEADS, KEYS, 1).sigmoid()
    transitions[2::7] = 0.0
    return op, Summary(transitions, states)


def at(summaries, segment):
    return Summary(*(part[segment] for part in summaries))


def gathered(summaries, layout):
    """As a gather has them, rank after rank."""
    held = [span for rank in range(layout.ranks) for span in layout.spans_of(rank)]
    return Summary(*(part[held] for part in summaries))


def scanned(summaries, layout, rank, combine, advance, state, *, mirrored=False):
    plan = stretches(layout, rank, mirrored=mirrored)
    needed = Summary(*(part[plan.needed] for part in gathered(summaries, layout)))
    return scan(needed, plan, [torch.tensor(order) for order in plan.orders], combine, advance, state)


@pytest.mark.parametrize(("ranks", "spans"), LAYOUTS)
@pytest.mark.parametrize("kind", ["elementwise", "matrix", "stabilised", "written outside"])
def test_a_rank_gets_the_states_and_gradients_of_the_loop(kind, ranks, spans):
    torch.manual_seed(0)
    layout = Layout(ranks * spans, ranks, spans)
    op, summaries = summaries_of(kind, ranks * spans)
    states = [op.zero_state(summaries.state[0])]
    for segment in range(ranks * spans):
        states.append(op.advance(at(summaries, segment), states[-1]))
    local = torch.stack([op.with_units(normal(*state.shape), state) for state in states[:-1]])
    asked, dstates = Summary(summaries.transition, local), [torch.zeros_like(local[0])]
    for segment in reversed(range(ranks * spans)):
        dstates.insert(0, op.retreat(at(asked, segment), dstates[0], local[segment]))

    def retreat(summary, dstate):
        return op.retreat(summary, dstate, summary.state)

    for rank in range(ranks):
        held = layout.spans_of(rank)
        found = scanned(summaries, layout, rank, op.combine, op.advance, states[0])
        torch.testing.assert_close(found, [states[span] for span in held], atol=1e-12, rtol=1e-12)
        found = scanned(asked, layout, rank, op.combine_backward, retreat, dstates[-1], mirrored=True)
        torch.testing.assert_close(found[::-1], [dstates[span + 1] for span in held], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("ranks", "spans"), [(8, 1), (8, 2), (32, 8), (64, 4)])
def test_calls_grow_with_spans_and_the_logarithm_of_ranks(ranks, spans):
    layout = Layout(ranks * spans, ranks, spans)
    op, summaries = summaries_of("elementwise", ranks * spans)
    for rank in (0, ranks // 2, ranks - 1):
        calls = []

        def combine(later, earlier, calls=calls):
            calls.append("combine")
            return op.combine(later, earlier)

        def advance(summary, state, calls=calls):
            calls.append("advance")
            return op.advance(summary, state)

        states = scanned(summaries, layout, rank, combine, advance, op.zero_state(summaries.state[0]))
        assert len(states) == spans  # of this rank's spans alone
        assert calls.count("advance") <= spans + 2 * LEVEL
        assert calls.count("combine") <= math.ceil(math.log2(2 * ranks))


def test_no_segment_beyond_the_last_span_is_looked_at():
    layout = Layout(12, 4, 3)
    for rank in range(4):
        held, count = layout.spans_of(rank), 12
        order = [span for other in range(4) for span in layout.spans_of(other)]
        before, after = stretches(layout, rank), stretches(layout, rank, mirrored=True)
        assert [order[place] for place in before.needed] == list(range(held[-1]))
        assert [order[place] for place in after.needed] == list(range(count - 1, held[0], -1))
