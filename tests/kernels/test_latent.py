"""Latent attention: expanded it is softmax attention, absorbed it is the same, and shapes that do not fit are named."""

import pytest
import torch
from torch import Tensor

from longreach.kernels import dispatch
from longreach.kernels.block_sparse import block_sparse_attention
from longreach.kernels.blocks import BlockLayout
from longreach.kernels.documents import Documents
from longreach.kernels.latent import (
    Dims,
    LatentAttend,
    LatentInputs,
    absorbing_pays,
    expand,
    latent_attention,
    listed_latent_attention,
)
from longreach.kernels.masks import Mask
from longreach.kernels.softmax import reference, softmax_attention

H, K, V = 3, 5, 4


def drawn(queries: int, keys: int, shared: int, rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, H, shared + K), (2, keys, shared + rank), (H * (K + V), rank), (H,)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("shared", "rank"), [(2, 6), (0, 7)])
def test_it_is_softmax_attention_over_what_the_latents_expand_to(backend: str, shared: int, rank: int) -> None:
    """Outputs, log-sum-exps and the gradients of both, against autograd through the expansion."""
    documents = Documents.from_lengths([[19, 40], [63]], 63)
    inputs = [x.requires_grad_() for x in drawn(63, 63, shared, rank)]
    q, latent, expansion, sinks = inputs
    out, lse = latent_attention(
        q, latent, expansion, documents=documents, scale=0.6, sink_logits=sinks, return_lse=True, backend=backend
    )
    k, v = expand(latent, expansion, heads=H, key_dim=shared + K)
    expected = softmax_attention(
        q, k, v, documents=documents, scale=0.6, sink_logits=sinks, return_lse=True, backend="reference"
    )
    for ours, theirs in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    results = (torch.autograd.grad(pair, inputs, (dout, dlse)) for pair in ((out, lse), expected))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("queries", "window"), [(1, None), (3, None), (2, 4)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_absorbed_form_is_the_expanded_one(queries: int, window: int | None, backend: str) -> None:
    q, latent, expansion, _ = drawn(queries, 33, 2, 20)
    inputs, op = LatentInputs(q, latent, expansion), LatentAttend(Mask(window=window), 0.5)
    assert absorbing_pays(queries, 33, Dims.of(inputs))
    tile = op.tile(Documents.whole(2, queries, position=33 - queries), Documents.whole(2, 33))
    for absorbed, expanded in zip(
        op.decode(inputs, (latent,), tile, backend), op.attend(inputs, (latent,), tile, backend), strict=True
    ):
        torch.testing.assert_close(absorbed, expanded, atol=1e-9, rtol=1e-9)


def test_a_reference_that_is_chosen_for_the_process_runs_the_absorbed_form(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    q, latent, expansion, _ = drawn(1, 33, 2, 20)
    inputs, op = LatentInputs(q, latent, expansion), LatentAttend(Mask(), 0.5)
    tile = op.tile(Documents.whole(2, 1, position=32), Documents.whole(2, 33))
    ran, attend = [], reference.attend
    monkeypatch.setattr(reference, "attend", lambda *args, **kwargs: ran.append(args) or attend(*args, **kwargs))
    op.decode(inputs, (latent,), tile, "auto")
    assert not ran
    request.addfinalizer(lambda: dispatch.choose({}, "cpu"))
    dispatch.choose({"softmax_attention": "reference"}, "cpu")
    op.decode(inputs, (latent,), tile, "auto")
    assert ran


def test_many_queries_are_not_absorbed() -> None:
    deepseek = Dims(shared=64, key=128, value=128, latent=512)
    assert absorbing_pays(1, 4096, deepseek)
    assert absorbing_pays(128, 100_000, deepseek)
    assert not absorbing_pays(256, 100_000, deepseek)
    assert not absorbing_pays(4096, 4096, deepseek)


def test_gradients_of_halves_are_added_up_in_float32() -> None:
    """Both matrix products of the backward are exact up to their inputs' rounding."""
    exact = [x.requires_grad_() for x in drawn(40, 40, 2, 6)]
    halves = [x.detach().bfloat16().requires_grad_() for x in exact]
    found = []
    for q, latent, expansion, _ in (exact, halves):
        out = latent_attention(q, latent, expansion)
        found.append(torch.autograd.grad(out, (q, latent, expansion), torch.ones_like(out)))
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 15)}, "q must be floating point with 4 dims"),
        ({"latent": torch.zeros(1, 4, 8)}, "q and latent must be of one dtype and batch"),
        ({"expansion": torch.zeros(28, 6)}, r"expansion must be \[H \(K \+ V\), C\]"),
        ({"expansion": torch.zeros(15, 6)}, r"expansion must be \[H \(K \+ V\), C\]"),
        ({"expansion": torch.zeros(27, 9)}, r"expansion must be \[H \(K \+ V\), C\]"),
        ({"sink_logits": torch.zeros(4)}, "sink_logits must be one for each of 3 heads"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    q, latent, expansion, sinks = drawn(4, 4, 2, 6, torch.float32)
    inputs = LatentInputs(q, latent, expansion, sinks)._replace(**change)
    with pytest.raises(ValueError, match=message):
        latent_attention(*inputs[:3], sink_logits=inputs.sink_logits)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("block_size", "backend"), [(1, "auto"), (5, "auto"), (5, "reference")])
def test_listed_rows_are_one_key_and_its_last_dims_the_value(heads: int, block_size: int, backend: str) -> None:
    documents = Documents.from_lengths([[20, 11], [3, 25]], 31)
    q, latent = normal(2, 31, 4, 9), normal(2, 31, 9, seed=1)
    choice = torch.rand(2, 31, heads, 40, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :7].int()
    counts = torch.tensor(BlockLayout(documents, block_size).counts).view(2, 1, 1, 1)
    blocks = choice.masked_fill(choice >= counts, -1)
    settings = {"block_size": block_size, "scale": 0.3, "documents": documents}

    def of(call):
        leaves = [x.clone().requires_grad_() for x in (q, latent)]
        out = call(*leaves)
        return out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=3))

    ours = of(lambda q, rows: listed_latent_attention(q, rows, blocks, latent_rank=6, backend=backend, **settings))
    theirs = of(
        lambda q, rows: block_sparse_attention(
            q, rows.unsqueeze(2), rows[..., None, 3:], blocks, backend="reference", **settings
        )
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_latent_that_does_not_fit_its_rank_is_named() -> None:
    q, latent, blocks = normal(1, 3, 2, 5), normal(1, 3, 5), torch.zeros(1, 3, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"latent must be \[B, S, R \+ C\] with C = 6"):
        listed_latent_attention(q, latent, blocks, latent_rank=6, block_size=1, scale=1.0)
    with pytest.raises(ValueError, match="blocks must have lists for 1 or 2 heads; got 3"):
        listed_latent_attention(q, latent, blocks.expand(-1, -1, 3, -1), latent_rank=4, block_size=1, scale=1.0)
