"""Every op over gloo ranks against itself on one: outputs and all gradients, float64, packed documents."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longreach.kernels.documents import Documents
from longreach.kernels.mask import Mask
from longreach.parallel import collectives, ops
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Kept, Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer import failure

LENGTH, HEADS, GROUPS, KEY, VALUE, WIDTH, STATES = 96, 4, 2, 6, 10, 8, 3
# Two rows: one with documents that cross spans and padding at the end, one that is a single document.
PACKED = Documents.from_lengths([[7, 41, 1, 30, 5], [LENGTH]], LENGTH)
# Rows of which whole ranks are padding, or one-token documents.
SPARSE = Documents.from_lengths([[3, 2], [1] * 20 + [60]], LENGTH)

Op = Callable[..., Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def softmax_inputs(sinks: bool = False) -> list[Tensor]:
    q, k, v = draw(2, LENGTH, HEADS, KEY), draw(2, LENGTH, GROUPS, KEY), draw(2, LENGTH, GROUPS, VALUE)
    return [q, k, v, *([draw(HEADS)] if sinks else [])]


def linear_inputs(*decay: int, heads: int = HEADS) -> list[Tensor]:
    inputs = [draw(2, LENGTH, heads, KEY), draw(2, LENGTH, heads, KEY), draw(2, LENGTH, HEADS, VALUE)]
    return inputs + ([-draw(*decay).abs() * 0.3] if decay else [])


def values_decay(q: Tensor, k: Tensor, v: Tensor, value_log_decay: Tensor, *log_decay: Tensor, seq: Sequence) -> Tensor:
    return ops.gated_linear_attention(q, k, v, *log_decay, value_log_decay=value_log_decay, seq=seq)


def value_decay_inputs(*decay: int) -> list[Tensor]:
    *vectors, log_decay = linear_inputs(*decay)
    return [*vectors, -draw(2, LENGTH, HEADS, VALUE).abs() * 0.3, log_decay]


def with_bonus(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, *, seq: Sequence) -> Tensor:
    return ops.gated_linear_attention(q, k, v, log_decay, bonus=bonus, read="exclusive", seq=seq)


def divided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_input: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    seq: Sequence,
    normaliser: str = "sum",
) -> Tensor:
    """Over sums of positive products, which are not near 0."""
    read = "inclusive" if bonus is None else "exclusive"
    return ops.gated_linear_attention(
        q.abs() + 0.1, k.abs() + 0.1, v, log_decay, log_input=log_input, bonus=bonus, read=read,
        normaliser=normaliser, seq=seq,
    )  # fmt: skip


def delta_inputs(*decay: int, erase: bool = False, heads: int = HEADS) -> list[Tensor]:
    """q, k, v, and a beta or a pair to erase; erased directions have length 1, as all users of the rule make them."""
    q, k, v = draw(2, LENGTH, heads, KEY), draw(2, LENGTH, heads, KEY), draw(2, LENGTH, HEADS, VALUE)
    direction = torch.nn.functional.normalize(k, dim=-1)
    log_decay = [-draw(*decay).abs() * 0.3] if decay else []
    if erase:
        return [q, draw(2, LENGTH, heads, KEY), v, -direction, direction * torch.rand_like(k), *log_decay]
    return [q, direction, v, draw(2, LENGTH, HEADS).sigmoid(), *log_decay]


def erase(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *log_decay: Tensor, seq: Sequence) -> Tensor:
    return ops.delta_rule(q, k, v, None, *log_decay, erase=(a, b), seq=seq)


def attend(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None = None, *, seq: Sequence, **mask: int) -> Tensor:
    return ops.softmax_attention(q, k, v, seq=seq, mask=Mask(**mask), sink_logits=sink_logits)


def selective_inputs(longhorn: bool = False) -> list[Tensor]:
    x, delta, b, c = (
        draw(2, LENGTH, WIDTH),
        draw(2, LENGTH, WIDTH).abs(),
        draw(2, LENGTH, STATES),
        draw(2, LENGTH, STATES),
    )
    if longhorn:
        return [x, delta / (1 + delta * b.square().sum(-1, keepdim=True)), b, c]
    return [x, 0.1 * delta, -draw(WIDTH, STATES).abs(), b, c]


def longhorn(x: Tensor, delta: Tensor, b: Tensor, c: Tensor, *, seq: Sequence) -> Tensor:
    return ops.selective_scan(x, delta, None, b, c, seq=seq, decay="longhorn")


CASES: dict[str, tuple[Op, Callable[[], list[Tensor]], dict[str, Any]]] = {
    "softmax": (attend, softmax_inputs, {}),
    "window": (attend, softmax_inputs, {"window": 9}),
    "short window": (attend, softmax_inputs, {"window": 1}),
    "sinks": (attend, lambda: softmax_inputs(sinks=True), {"window": 5, "sink_tokens": 3}),
    "undecayed": (ops.gated_linear_attention, linear_inputs, {}),
    "constant decay": (ops.gated_linear_attention, lambda: linear_inputs(HEADS), {}),
    "scalar decay": (ops.gated_linear_attention, lambda: linear_inputs(2, LENGTH, HEADS), {}),
    "channel decay": (ops.gated_linear_attention, lambda: linear_inputs(2, LENGTH, HEADS, KEY), {}),
    "grouped": (ops.gated_linear_attention, lambda: linear_inputs(2, LENGTH, HEADS, heads=GROUPS), {}),
    "constant channels": (ops.gated_linear_attention, lambda: linear_inputs(HEADS, KEY), {}),
    "value decay": (values_decay, lambda: value_decay_inputs(2, LENGTH, HEADS, KEY), {}),
    "bonus": (with_bonus, lambda: [*linear_inputs(2, LENGTH, HEADS, KEY), draw(HEADS, KEY)], {}),
    "normaliser": (divided, lambda: linear_inputs(2, LENGTH, HEADS), {}),
    "input gate": (
        divided,
        lambda: [*linear_inputs(2, LENGTH, HEADS), 4 * draw(2, LENGTH, HEADS)],
        {"normaliser": "at_least_one"},
    ),
    "input gate, bonus": (
        divided,
        lambda: [*linear_inputs(HEADS), 4 * draw(2, LENGTH, HEADS), draw(HEADS, KEY).abs()],
        {},
    ),
    "delta": (ops.delta_rule, delta_inputs, {}),
    "gated delta": (ops.delta_rule, lambda: delta_inputs(2, LENGTH, HEADS, heads=GROUPS), {}),
    "channel delta": (ops.delta_rule, lambda: delta_inputs(2, LENGTH, HEADS, KEY), {}),
    "general delta": (erase, lambda: delta_inputs(2, LENGTH, HEADS, KEY, erase=True), {}),
    "scan": (ops.diagonal_scan, lambda: [draw(2, LENGTH, WIDTH), -draw(2, LENGTH, WIDTH).abs() * 0.3], {}),
    "constant scan": (ops.diagonal_scan, lambda: [draw(2, LENGTH, WIDTH, 3), -draw(WIDTH, 3).abs() * 0.3], {}),
    "selective scan": (ops.selective_scan, selective_inputs, {}),
    "longhorn": (longhorn, lambda: selective_inputs(longhorn=True), {}),
    "conv": (ops.short_conv, lambda: [draw(2, LENGTH, WIDTH), draw(WIDTH, 4)], {}),
    "wide conv": (ops.short_conv, lambda: [draw(2, LENGTH, WIDTH), draw(WIDTH, 30)], {}),
    "shift": (ops.token_shift, lambda: [draw(2, LENGTH, WIDTH)], {}),
}


CHANNELS = (ops.short_conv, ops.token_shift)


def is_sequence(x: Tensor) -> bool:
    return x.dim() >= 2 and x.shape[1] == LENGTH


def one_rank(name: str, documents: Documents) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    torch.manual_seed(0)
    op, make, settings = CASES[name]
    inputs = [x.requires_grad_() for x in make()]
    out = op(*inputs, seq=Sequence.single(documents), **settings)
    dout = torch.randn_like(out)
    out.backward(dout)
    return out.detach(), [x.grad for x in inputs], dout, [x.detach() for x in inputs]


def agrees(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def compare(rank: int, world: int, names: list[str], spans: int, keep: bool, ulysses: int = 1) -> None:
    """Every case with the default strategies, or exchanging tokens for heads among so many ranks; or gathered (0)."""
    mesh = Mesh.create(world, max(1, ulysses))
    strategy = Strategy("gather") if ulysses == 0 else Strategy("ulysses", "ulysses") if ulysses > 1 else Strategy()
    for name in names:
        for documents in (PACKED, SPARSE):
            out, gradients, dout, inputs = one_rank(name, documents)
            op, _, settings = CASES[name]
            layout = Layout(LENGTH, world, spans)
            seq = replace(Sequence.shared(documents, layout, mesh, strategy), kept=Kept() if keep else None)
            local = [(seq.shard(x) if is_sequence(x) else x).clone().requires_grad_() for x in inputs]
            if keep:
                result = checkpoint(lambda *x: op(*x, seq=seq, **settings), *local, use_reentrant=False)
            else:
                result = op(*local, seq=seq, **settings)
            result.backward(seq.shard(dout))
            agrees(result, seq.shard(out), f"{name}, output")
            for x, whole, gradient in zip(local, inputs, gradients, strict=True):
                if is_sequence(whole):
                    gradient = seq.shard(gradient)
                else:
                    dist.all_reduce(x.grad)
                agrees(x.grad, gradient, f"{name}, gradient")


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4, 8))])
@pytest.mark.parametrize("spans", [1, 2, 4])
def test_ranks_agree_with_one(world: int, spans: int) -> None:
    run_ranks(world, compare, list(CASES), spans, False)


ATTENTION = [name for name, (op, _, _) in CASES.items() if op is attend]
BY_HEADS = [name for name, (op, _, _) in CASES.items() if op not in CHANNELS]


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
@pytest.mark.parametrize("spans", [1, 2, 4])
def test_gathered_attention_agrees_with_one(world: int, spans: int) -> None:
    run_ranks(world, compare, ATTENTION, spans, False, 0)


@pytest.mark.parametrize(
    ("world", "ulysses"), [(2, 2), *(pytest.param(4, ulysses, marks=pytest.mark.slow) for ulysses in (2, 4))]
)
@pytest.mark.parametrize("spans", [1, 2, 4])
def test_ranks_by_heads_agree_with_one(world: int, ulysses: int, spans: int) -> None:
    run_ranks(world, compare, BY_HEADS, spans, False, ulysses)


def test_recomputation_by_heads_and_by_gathering() -> None:
    run_ranks(2, compare, ["softmax", "scalar decay"], 2, True, 2)
    run_ranks(2, compare, ["softmax"], 2, True, 0)


def silent_peer(rank: int, world: int) -> str:
    """What the first rank raises when the second does not come."""
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    if rank == 1:
        time.sleep(3)
        return ""
    q, k, v = softmax_inputs()
    seq = Sequence(PACKED, Layout(LENGTH, world), rank, group).at(7)
    with pytest.raises(RuntimeError) as caught:
        ops.softmax_attention(*(seq.shard(x) for x in (q, k, v)), seq=seq)
    return failure.message(caught.value, started=True)


def test_a_silent_rank_is_told_with_the_op_that_waited_for_it() -> None:
    said = run_ranks(2, silent_peer)[0]
    assert "has lost another rank" in said
    assert "in RingAttention of layer 7, on rank 0 of the 2 that share a row" in said


def test_recomputation_repeats_no_collective() -> None:
    run_ranks(2, counted, timeout=60)


def counted(rank: int, world: int) -> None:
    """Keeping results: the gradients are the same, and the second forward sends nothing."""
    compare(rank, world, ["softmax", "scalar decay", "conv"], 2, True)
    made = []
    real = collectives.all_gather
    collectives.all_gather = lambda *args, **kwargs: made.append(1) or real(*args, **kwargs)
    try:
        compare(rank, world, ["scalar decay"], 2, True)
        kept = len(made)
        compare(rank, world, ["scalar decay"], 2, False)
        assert kept > 0
        assert len(made) == 2 * kept
    finally:
        collectives.all_gather = real


def test_a_document_elsewhere_changes_nothing() -> None:
    """Leak probe: no decay at all, one document perturbed, every other token's output bitwise as before."""
    run_ranks(2, leak, timeout=60)


def leak(rank: int, world: int) -> None:
    for name in ("softmax", "window", "undecayed", "wide conv", "shift"):
        torch.manual_seed(1)
        op, make, settings = CASES[name]
        inputs = make()
        seq = Sequence(PACKED, Layout(LENGTH, world, 2), rank, dist.group.WORLD)
        touched = PACKED.ids() == 1
        moved = [
            torch.where(touched.view(2, LENGTH, *[1] * (x.dim() - 2)), x + 1.0, x) if is_sequence(x) else x
            for x in inputs
        ]
        before, after = (
            op(*[seq.shard(x) if is_sequence(x) else x for x in xs], seq=seq, **settings) for xs in (inputs, moved)
        )
        changed = (before != after).flatten(2).any(-1)
        assert not changed[~seq.shard(touched)].any(), name
        assert changed[seq.shard(touched)].any(), name
