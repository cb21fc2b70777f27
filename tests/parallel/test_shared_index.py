"""The loss of an indexer on ranks: the value and every gradient of one device, and what travels for it."""

import pytest
import torch
from block_cases import GROUPS, HEADS, KEY, LENGTH, PACKINGS, agrees, differentiated, sequence
from distributed import run_threads
from largest_tensor import LargestTensor

from longreach.kernels.blocks import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.gate_divergence import chunked as gate_chunked
from longreach.kernels.gate_divergence import gate_divergence as gates_on_one_device
from longreach.kernels.index_divergence import chunked
from longreach.kernels.index_divergence import index_divergence as on_one_device
from longreach.parallel.collectives import counting
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.ops import gate_divergence, index_divergence
from longreach.parallel.sequence import DecodingCache, Sequence

DIM = 3


def drawn(weighted):
    torch.manual_seed(0)
    heads = 3 if weighted else GROUPS
    shapes = [(HEADS, KEY), (GROUPS, KEY), (heads, DIM), (1, DIM), *([(heads,)] if weighted else [])]
    return [torch.randn(2, LENGTH, *shape, dtype=torch.float64) for shape in shapes]


def lists_of(documents, size, heads):
    """Every query's own block, and one before it in its document."""
    layout, places = BlockLayout(documents, size), documents.positions().long()
    own = layout.ids(documents)
    other = own - (places // size - (7 * places) % (places // size).clamp(min=1)).int()
    other = torch.where(other == own, -1, other).masked_fill(own < 0, -1)
    return torch.stack([own, other], dim=-1).unsqueeze(2).expand(-1, -1, heads, -1).contiguous()


def weigh(out):
    torch.manual_seed(3)
    return torch.randn(2, LENGTH, out.shape[2], dtype=torch.float64)


def on_ranks(rank, world, spans, packing, weighted, size):
    seq = sequence(PACKINGS[packing], rank, world, spans)
    lists = None if size is None else seq.shard(lists_of(PACKINGS[packing], size, 1 if weighted else GROUPS))
    with counting() as sent:
        out, gradients = differentiated(
            lambda *x: index_divergence(*x, *([] if weighted else [None]), lists, seq=seq, block_size=size),
            [seq.shard(x) for x in drawn(weighted)],
            lambda out: seq.shard(weigh(out)),
        )
    return out, gradients, dict(sent)


@pytest.mark.parametrize(
    ("world", "spans", "packing", "weighted", "size", "gather_from"),
    [
        (2, 1, "borders inside blocks", True, None, 16),
        (3, 2, "ranks of padding", False, None, 16),
        (4, 2, "documents of one token", True, None, 16),
        (2, 2, "one long document", False, 8, 0),
        (3, 1, "borders inside blocks", False, 5, 16),
        (3, 1, "borders inside blocks", False, 5, 0),
        (4, 1, "one long document", True, 1, 16),
        (4, 2, "ranks of padding", True, 1, 0),
    ],
)
def test_ranks_give_what_one_device_gives(monkeypatch, world, spans, packing, weighted, size, gather_from):
    monkeypatch.setattr(chunked, "gather_from", lambda sharing: gather_from)
    documents = PACKINGS[packing]
    lists = None if size is None else lists_of(documents, size, 1 if weighted else GROUPS)
    expected, wanted = differentiated(
        lambda *x: on_one_device(*x, *([] if weighted else [None]), lists, block_size=size, documents=documents),
        drawn(weighted),
        weigh,
    )
    results = run_threads(world, on_ranks, spans, packing, weighted, size)
    layout = Layout(LENGTH, world, spans)
    agrees(layout.unshard([out for out, *_ in results]), expected, "divergence")
    for index, gradient in enumerate(wanted):
        agrees(layout.unshard([gradients[index] for _, gradients, _ in results]), gradient, f"gradient {index}")


def test_only_the_keys_of_listed_blocks_travel():
    some, every = (run_threads(2, on_ranks, 1, "one long document", True, size) for size in (1, None))
    sent = [max(sum(bytes.values()) for *_, bytes in results) for results in (some, every)]
    assert sent[0] < sent[1]


def test_decoding_is_refused():
    seq = Sequence.decoding(DecodingCache(), 2, LENGTH)
    with pytest.raises(ValueError, match="index_divergence must be called in training"):
        index_divergence(*drawn(True), seq=seq)


def gates_on_ranks(rank, world, spans, packing, size, listed):
    seq = sequence(PACKINGS[packing], rank, world, spans)
    lists = seq.shard(lists_of(PACKINGS[packing], size, GROUPS)) if listed else None
    q, k, gate_q, gate_k = drawn_gates(size)
    return differentiated(
        lambda *x: gate_divergence(*x, lists, seq=seq, block_size=size),
        [seq.shard(q), seq.shard(k), seq.shard(gate_q), gate_k],
        lambda out: seq.shard(weigh(out)),
    )


def drawn_gates(size):
    torch.manual_seed(0)
    shapes = [(LENGTH, HEADS, KEY), (LENGTH, GROUPS, KEY), (LENGTH, GROUPS, DIM), (LENGTH // size, GROUPS, DIM)]
    return [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(
    ("world", "spans", "packing", "size", "listed"),
    [
        (2, 2, "one long document", 5, False),
        (3, 1, "borders inside blocks", 8, True),
        (4, 2, "ranks of padding", 3, False),
        (4, 1, "borders inside blocks", 5, True),
    ],
)
def test_gates_on_ranks_give_what_one_device_gives(world, spans, packing, size, listed):
    documents = PACKINGS[packing]
    lists = lists_of(documents, size, GROUPS) if listed else None
    expected, wanted = differentiated(
        lambda *x: gates_on_one_device(*x, lists, block_size=size, documents=documents), drawn_gates(size), weigh
    )
    results, layout = run_threads(world, gates_on_ranks, spans, packing, size, listed), Layout(LENGTH, world, spans)
    agrees(layout.unshard([out for out, _ in results]), expected, "divergence")
    agrees(layout.unshard([gradients[2] for _, gradients in results]), wanted[2], "gradient of gate_q")
    agrees(torch.stack([gradients[3] for _, gradients in results]).sum(0), wanted[3], "gradient of gate_k")


def test_attention_that_puts_all_weight_on_the_last_tokens_leaves_gates_finite():
    q, k, gate_q, gate_k = drawn_gates(5)
    results = (gates_on_one_device(300 * q, k, gate_q, gate_k, block_size=5, documents=PACKINGS[p]) for p in PACKINGS)
    assert all(out.isfinite().all() for out in results)


HELD = {"batch": 1, "groups": 2, "key": 256, "size": 4, "ranks": 4}


def held_by(rank, world, length, listed):
    """The largest tensor of a loss and its gradients, and what is sent for them."""
    documents = Documents.whole(1, length)
    seq = Sequence(documents, Layout(length, world, 2), rank, Mesh.create(world).sequence_group)
    own = length // world
    q, k = (torch.randn(1, own, HELD["groups"], HELD["key"]) for _ in range(2))
    gate_q, gate_k = (torch.randn(1, n, HELD["groups"], 2).requires_grad_() for n in (own, length // HELD["size"]))
    ids = BlockLayout(documents, HELD["size"]).ids(documents)
    lists = seq.shard(ids[..., None, None].repeat(1, 1, HELD["groups"], 1)) if listed else None
    with LargestTensor() as largest, counting() as sent:
        gate_divergence(q, k, gate_q, gate_k, lists, seq=seq, block_size=HELD["size"]).sum().backward()
    return largest.numel, dict(sent)


@pytest.mark.parametrize("listed", [False, True])
def test_no_rank_holds_the_keys_of_a_row_or_every_score_for_a_gates_loss(monkeypatch, listed):
    """What a rank holds at once grows with its part of the row, and not with the square of it."""
    monkeypatch.setattr(gate_chunked, "SCORES", 1 << 11)
    monkeypatch.setattr(gate_chunked, "KEYS", 64)
    own, bytes_of_keys = HELD["groups"] * HELD["key"], 4
    for length in (128, 512):
        results = run_threads(HELD["ranks"], held_by, length, listed)
        tokens = length // HELD["ranks"]
        assert max(most for most, _ in results) < 1.5 * tokens * own
        for _, sent in results:
            if listed:  # the block that each span begins and ends in has all its tokens there
                assert sum(sent.values()) < tokens * own * bytes_of_keys
            else:  # keys for the log-sum-exp, and blocks of them, forward and backward
                hops = 3 * (HELD["ranks"] - 1)
                assert 0.5 * hops < sent["exchange"] / (tokens * own * bytes_of_keys) <= hops + 0.2
