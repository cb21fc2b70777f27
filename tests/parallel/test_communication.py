"""What ranks send, counted, is what docs/communication.md says."""

from functools import partial

import pytest
import torch
from distributed import run_threads
from torch import Tensor

from longreach.kernels import latent as latent_attention
from longreach.kernels import short_conv
from longreach.kernels.delta_rule import DeltaRecurrence
from longreach.kernels.diagonal_scan import DiagonalRecurrence
from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import GatedLinearRecurrence
from longreach.kernels.masks import Mask
from longreach.kernels.slot_attention import SlotRecurrence
from longreach.parallel import ops
from longreach.parallel.collectives import counting
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import ThreadGroup, this_rank

B, H, G, K, V, D, TAPS = 2, 4, 2, 8, 12, 16, 4


def counts(rank: int, world: int, name: str, length: int, spans: int, strategy: Strategy, ulysses: int) -> list[int]:
    """Bytes sent forward and backward by this rank."""
    seq = Sequence.shared(
        Documents.whole(B, length), Layout(length, world, spans), Mesh.create(world, ulysses), strategy
    )
    tokens = length // world

    def draw(*shape: int) -> Tensor:
        return torch.rand(B, tokens, *shape)

    q, k, v = draw(H, K), draw(G, K), draw(G, V)
    heads = [draw(H, K), draw(H, K), draw(H, V)]
    masks = {"full": Mask(causal=False), "causal": Mask(), "window": Mask(window=tokens)}
    inputs, call = {
        **{
            kind: ([q, k, v], lambda q, k, v, mask=mask: ops.softmax_attention(q, k, v, seq=seq, mask=mask))
            for kind, mask in masks.items()
        },
        "levels": (
            [q, k, draw(1, V), draw(H)],
            lambda q, k, v, levels: ops.softmax_attention(q, k, v, seq=seq, mask=masks["full"], levels=levels),
        ),
        "scalar": ([*heads, -draw(H)], lambda *x: ops.gated_linear_attention(*x, seq=seq)),
        "channel": ([*heads, -draw(H, K)], lambda *x: ops.gated_linear_attention(*x, seq=seq)),
        "delta": ([*heads, draw(H)], lambda *x: ops.delta_rule(*x, seq=seq)),
        "slots": ([*heads, draw(H, 5), -draw(H, 5)], lambda *x: ops.slot_attention(*x, seq=seq)),
        "scan": ([draw(D), -draw(D)], lambda *x: ops.diagonal_scan(*x, seq=seq)),
        "conv": ([draw(D), torch.rand(D, TAPS)], lambda *x: ops.short_conv(*x, seq=seq)),
        "shift": ([draw(D)], lambda x: ops.token_shift(x, seq=seq)),
    }[name]
    for x in inputs:
        x.requires_grad_()
    with counting() as forward:
        out = call(*inputs)
    with counting() as backward:
        out.sum().backward()
    return [sum(forward.values()), sum(backward.values())]


def counted(
    name: str, world: int, spans: int = 2, length: int = 96, strategy: Strategy | None = None, ulysses: int = 1
):
    return run_threads(world, counts, name, length, spans, strategy or Strategy(), ulysses)


def test_a_ring_of_which_every_key_is_seen() -> None:
    block = B * 24 * G * (K + V)
    assert counted("full", 4) == [[3 * block * 4, 3 * block * (4 + 4)]] * 4


def test_levels_travel_with_keys_and_shared_values_once() -> None:
    block = B * 24 * (G * K + V + H)
    assert counted("levels", 4) == [[3 * block * 4, 3 * block * (4 + 4)]] * 4


def test_a_causal_ring_passes_on_what_is_behind() -> None:
    block = B * 24 * G * (K + V) * 4
    found = counted("causal", 4, spans=1)
    # Rank r sends the blocks of ranks 0 … r to the next; backward the same, and home the gradients of those before it.
    assert found == [[block, block], [2 * block, 3 * block], [3 * block, 5 * block], [0, 3 * block]]


def test_a_window_is_sent_to_the_next_rank_alone() -> None:
    block = B * 24 * G * (K + V) * 4
    assert counted("window", 4, spans=1) == [[block, block], [block, 2 * block], [block, 2 * block], [0, block]]


def test_gathered_attention() -> None:
    block = B * 24 * G * (K + V)
    assert counted("causal", 4, strategy=Strategy("gather")) == [[3 * block * 4, 3 * block * (4 + 4)]] * 4


@pytest.mark.parametrize(("world", "groups"), [(2, 2), (4, 4)])
def test_attention_by_heads(world: int, groups: int) -> None:
    """Two groups go to four ranks as if they were four."""
    share = (world - 1) * B * (96 // world) * (H + groups) * (K + V) * 4 // world
    found = counted("causal", world, strategy=Strategy("ulysses"), ulysses=world)
    assert found == [[share, 2 * share]] * world


@pytest.mark.parametrize(
    ("heads", "shared", "key", "value", "rank", "expanded"),
    [(128, 64, 128, 128, 512, 40_960), (32, 64, 128, 128, 512, 10_240)],
    ids=["DeepSeek-V3", "Kimi Linear"],
)
def test_a_ring_of_latents(heads: int, shared: int, key: int, value: int, rank: int, expanded: int) -> None:
    """Of the numbers of a token's keys and values only the latent's, and the same of its gradient."""

    def counts(ranks_rank: int, world: int) -> tuple[int, int]:
        seq = Sequence.shared(Documents.whole(1, 4), Layout(4, world, 1), Mesh.create(world), Strategy())
        q, latent = torch.rand(1, 2, heads, shared + key), torch.rand(1, 2, shared + rank)
        expansion = torch.rand(heads * (key + value), rank)
        with counting() as forward:
            out = ops.latent_attention(
                *(x.requires_grad_() for x in (q, latent, expansion)), seq=seq, mask=Mask(causal=False)
            )
        with counting() as backward:
            out.sum().backward()
        return sum(forward.values()), sum(backward.values())

    assert shared + rank == 576
    assert heads * (shared + key + value) == expanded
    block = latent_attention.bytes_sent(2, latent_dim=rank, shared_dim=shared, ranks=2, element_bytes=4)
    assert block == 2 * 576 * 4
    assert run_threads(2, counts) == [(block, 2 * block)] * 2


@pytest.mark.parametrize(("heads", "sent"), [(8, 6), (2, 5)])
def test_latents_by_heads(heads: int, sent: int) -> None:
    """Every rank gets the whole latent of 6 numbers, or keys and values of 3 + 2 for its heads if these are fewer."""

    def counts(rank: int, world: int) -> int:
        mesh = Mesh.create(world, world)
        seq = Sequence.shared(Documents.whole(1, 8), Layout(8, world, 1), mesh, Strategy("ulysses"))
        q, latent, expansion = torch.rand(1, 4, heads, 3), torch.rand(1, 4, 6), torch.rand(heads * 4, 5)
        with counting() as forward:
            ops.latent_attention(q, latent, expansion, seq=seq)
        return sum(forward.values())

    share = heads // 2
    padded = lambda count: -(-count // 4) * 16  # noqa: E731  # bytes of so many numbers, each tensor at a multiple of 16
    there = padded(4 * share * 3) + (padded(4 * 6) if sent == 6 else padded(4 * share * 3) + padded(4 * share * 2))
    assert run_threads(2, counts) == [there + padded(4 * 2 * share * 2 // 2)] * 2


def test_listed_latents_send_the_rows_of_tokens_that_other_ranks_list() -> None:
    """Forward and, with gradients that come home, backward: 576 numbers a token at DeepSeek-V3.2's sizes."""

    def counts(rank: int, world: int) -> tuple[int, int]:
        seq = Sequence.shared(Documents.whole(1, 8), Layout(8, world, 1), Mesh.create(world), Strategy())
        q, latent = torch.rand(1, 4, 2, 576).requires_grad_(), torch.rand(1, 4, 576).requires_grad_()
        lists = torch.full((1, 4, 1, 3), -1, dtype=torch.int32)
        lists[0, 1, 0, :2], lists[0, 3, 0] = torch.tensor([0, 1]), torch.tensor([0, 2, 3])  # of both ranks' queries
        with counting() as forward:
            out = ops.listed_latent_attention(q, latent, lists, seq=seq, latent_rank=512, block_size=1, scale=0.1)
        with counting() as backward:
            out.sum().backward()
        return sum(forward.values()), sum(backward.values())

    told, rows = 8 + 1, 4 * 576 * 4  # which tokens a rank lists, a byte each; tokens 0 to 3, in float32
    assert run_threads(2, counts) == [(told + rows, rows), (told, rows)]


KEYS, VALUES, CHANNELS = torch.empty(B, 1, H, K), torch.empty(B, 1, H, V), torch.empty(B, 1, D)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("scalar", partial(GatedLinearRecurrence().bytes_sent, (KEYS, KEYS, VALUES, KEYS[..., 0]))),
        ("channel", partial(GatedLinearRecurrence().bytes_sent, (KEYS, KEYS, VALUES, KEYS))),
        ("delta", partial(DeltaRecurrence().bytes_sent, (KEYS, KEYS, VALUES))),
        ("slots", partial(SlotRecurrence().bytes_sent, (KEYS, KEYS, VALUES, KEYS[..., :5], KEYS[..., :5]))),
        ("scan", partial(DiagonalRecurrence().bytes_sent, (CHANNELS, CHANNELS))),
        ("conv", partial(short_conv.bytes_sent, batch=B, channels=D, taps=TAPS, element_bytes=4)),
        ("shift", partial(short_conv.bytes_sent, batch=B, channels=D, taps=2, element_bytes=4)),
    ],
)
def test_states_and_halos_as_the_ops_say(name, formula) -> None:
    expected = formula(ranks=2, spans=2)
    assert [sum(parts) for parts in counted(name, 2)] == [expected] * 2


def test_one_gather_carries_the_keys_and_the_values_of_slots(monkeypatch) -> None:
    gathers, original = [], ThreadGroup.all_gather
    noted = lambda self, *tensors: (gathers.append(this_rank().rank), original(self, *tensors))  # noqa: E731
    monkeypatch.setattr(ThreadGroup, "all_gather", noted)
    counted("slots", 2)
    assert sorted(gathers) == [0, 0, 1, 1]  # forward and backward


@pytest.mark.parametrize("name", ["scalar", pytest.param("delta", marks=pytest.mark.slow)])
def test_states_do_not_grow_with_the_length(name: str) -> None:
    assert counted(name, 2, length=4096) == counted(name, 2, length=65536)
