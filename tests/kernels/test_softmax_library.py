"""Attention by libraries: how a tile is cut into their calls, who is trusted with them, and that parts merge.

Where there is no GPU a stand-in computes each call as its limits say.
"""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels import dispatch, softmax
from longreach.kernels.attend import Gradient
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.masks.calls import Call, Span, plan
from longreach.kernels.softmax import library, reference, softmax_attention
from longreach.kernels.softmax.library import Problem, Provider
from longreach.parallel.layout import Layout

MASKS = [Mask(), Mask(causal=False), Mask(window=1), Mask(window=9), Mask(window=9, sink_tokens=3), Mask(window=40)]
PACKED = Documents.from_lengths([[3, 24, 1, 13], [30]], 43)


def band(call, n, m):
    """bool `[n, m]`: what a span of n queries and m keys shows under the call's limits.

    As flash attention has them: a limit of as many keys as there are is none, whatever the number of queries.
    """
    i, j = torch.arange(n)[:, None] + m - n, torch.arange(m)[None, :]
    seen = torch.ones(n, m, dtype=torch.bool)
    if 0 <= call.left < m:
        seen &= j >= i - call.left
    return seen & (j <= i + call.right) if 0 <= call.right < m else seen


def by_span(at):
    """(queries, keys, weights in float64 before the softmax) of each span; heads first."""
    q_end = k_end = 0
    group = at.q.shape[1] // at.k.shape[1]
    for n, m in zip(*at.call.lengths, strict=True):
        queries, keys = slice(q_end, q_end := q_end + n), slice(k_end, k_end := k_end + m)
        k = at.k[keys].double().repeat_interleave(group, 1)
        scores = at.scale * torch.einsum("nhk,mhk->hnm", at.q[queries].double(), k)
        yield queries, keys, scores.masked_fill(~band(at.call, n, m), -math.inf)


def stand_in_forward(at):
    group = at.q.shape[1] // at.k.shape[1]
    out, lse = at.q.new_empty(*at.q.shape[:2], at.v.shape[2]), at.q.new_empty(at.q.shape[:2], dtype=torch.float32)
    for queries, keys, scores in by_span(at):
        v = at.v[keys].double().repeat_interleave(group, 1)
        out[queries] = torch.einsum("hnm,mhv->nhv", scores.softmax(-1), v).to(out.dtype)
        lse[queries] = scores.logsumexp(-1).T.float()
    return out, lse


def stand_in_backward(at, dout, out, lse):
    assert dout.dtype == out.dtype == at.q.dtype
    group = at.q.shape[1] // at.k.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (at.q, at.k, at.v))
    for queries, keys, scores in by_span(at):
        p = (scores - lse[queries].T[..., None].double()).exp()
        given, result = dout[queries].double(), out[queries].double()
        k, v = (x[keys].double().repeat_interleave(group, 1) for x in (at.k, at.v))
        ds = p * (torch.einsum("nhv,mhv->hnm", given, v) - (given * result).sum(-1).T[..., None]) * at.scale
        dq[queries] = torch.einsum("hnm,mhk->nhk", ds, k).to(dq.dtype)
        dk[keys] = (
            torch.einsum("hnm,nhk->mhk", ds, at.q[queries].double()).unflatten(1, (-1, group)).sum(2).to(dk.dtype)
        )
        dv[keys] = torch.einsum("hnm,nhv->mhv", p, given).unflatten(1, (-1, group)).sum(2).to(dv.dtype)
    return dq, dk, dv


STAND_IN = Provider("stand-in", lambda call, device: True, stand_in_forward, stand_in_backward)


@pytest.fixture
def providers(monkeypatch):
    """Sets who may serve calls, with nothing known of them yet."""

    def set_to(*given):
        monkeypatch.setattr(library, "PROVIDERS", list(given))
        monkeypatch.setattr(library, "_tested", {})

    return set_to


def draw(queries, keys=None, dtype=torch.bfloat16, heads=4, groups=2, dim=8, value_dim=8):
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(held.batch, held.length, *rest, generator=generator).to(dtype)
        for held, *rest in (
            (queries, heads, dim), (keys, groups, dim), (keys, groups, value_dim), (queries, heads, value_dim)
        )
    ]  # fmt: skip


def check_plan(mask, queries, keys):
    tile = mask.tile(queries, keys)
    if tile is None:
        return
    seen = torch.zeros(queries.batch, queries.length, keys.length, dtype=torch.int64)
    for call in plan(tile):
        used = torch.zeros(2, queries.batch, max(queries.length, keys.length), dtype=torch.int64)
        for row, (a, b), (c, d) in call.spans:
            shown = band(call, b - a, d - c)
            assert shown.any(1).all()
            seen[row, a:b, c:d] += shown
            used[0, row, a:b] += 1
            used[1, row, c:d] += 1
        assert used.max() == 1
    assert torch.equal(seen, mask.dense(queries, keys).long())


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    mask=st.sampled_from(MASKS),
    spans=st.integers(1, 3),
    pair=st.tuples(st.integers(0, 1), st.integers(0, 1)),
)
def test_calls_cover_every_visible_pair_once(lengths, mask, spans, pair):
    total = -(-sum(lengths) // (2 * spans)) * 2 * spans
    documents = Documents.from_lengths([lengths], total)
    layout = Layout(total, ranks=2, spans=spans)
    check_plan(mask, layout.documents(documents, pair[0]), layout.documents(documents, pair[1]))


def test_plain_rows_take_one_call():
    for mask, kind in ((Mask(), "causal"), (Mask(causal=False), "full"), (Mask(window=9), "band")):
        for documents in (Documents.whole(2, 40), PACKED.slice(4, 40)):
            kinds = {call.kind for call in plan(mask.tile(documents, documents))}
            assert kind in kinds
            assert kinds <= {kind, "full", "causal"}  # short documents need no limit
    documents = Documents.whole(3, 40)
    (call,) = plan(Mask().tile(documents, documents))
    assert call.is_dense
    late, early = Documents.whole(3, 40, position=40), Documents.whole(3, 40)
    (call,) = plan(Mask().tile(late, early))
    assert (call.kind, call.is_dense) == ("full", True)
    assert not Call(-1, 0, (Span(0, (0, 3), (0, 5)),)).is_dense


def test_what_is_asked_for_with_warnings_is_demanded_of_flash_attention():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for enabled, warn_only, inside in ((True, True, False), (True, False, False), (False, True, True)):
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            with library._insisting():
                assert torch.is_deterministic_algorithms_warn_only_enabled() == inside
                assert torch.are_deterministic_algorithms_enabled() == enabled
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_cudnn_is_given_no_short_spans(length):
    device = torch.device("cuda")
    for mask in (Mask(), Mask(causal=False)):
        (call,) = plan(mask.tile(Documents.whole(2, length), Documents.whole(2, length)))
        assert library._for_cudnn(call, device) == (length >= library.SHORTEST)
        assert not library._for_cudnn(call, torch.device("cpu"))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("spans", [1, 2])
def test_calls_merge_to_the_tile(mask, spans, providers):
    providers(STAND_IN)
    layout = Layout(44, ranks=2, spans=spans)
    row = Documents.from_lengths([[3, 24, 1, 13], [30]], 44)
    for queries, keys in ((PACKED, PACKED), (layout.documents(row, 1), layout.documents(row, 0))):
        tile = mask.tile(queries, keys)
        if tile is None:
            continue
        q, k, v, dout = draw(queries, keys)
        assert library.refusal(q, k, v, tile) is None
        found = library.attend(q, k, v, tile=tile, scale=0.3)
        wide = [x.double() for x in (q, k, v)]
        out, lse = reference.attend(*wide, tile=tile, scale=0.3)
        merged = (out / 2, lse + math.log(2))
        gradient = Gradient(dout.float(), *(x.float() for x in merged))
        back = library.attend_backward(gradient, q, k, v, tile=tile, scale=0.3)
        wanted = reference.attend_backward(Gradient(dout.double(), *merged), *wide, tile=tile, scale=0.3)
        assert {x.dtype for x in (*found, *back)} == {torch.float32}
        finite = lse.isfinite()
        torch.testing.assert_close(found[1].double()[finite], lse[finite], rtol=1e-5, atol=1e-5)
        assert (found[1][~finite] == -math.inf).all()
        for a, b in zip((found[0], *back), (out, *wanted), strict=True):
            assert (a.double() - b).norm() <= 0.01 * b.norm()


def test_a_provider_is_trusted_once_it_agrees_with_the_reference(providers):
    tried = []

    def raising(at: Problem):
        tried.append("raising")
        raise TypeError("no such argument")

    def wrong(at: Problem):
        tried.append("wrong")
        out, lse = stand_in_forward(at)
        return out, lse / math.log(2)  # log-sum-exp in another unit

    def blind(at, dout, out, lse):
        return stand_in_backward(at, dout, *stand_in_forward(at))  # its own lse in place of the merged one

    providers(
        STAND_IN._replace(name="absent", takes=lambda call, device: False),
        STAND_IN._replace(name="raising", forward=raising),
        STAND_IN._replace(name="wrong", forward=wrong),
        STAND_IN._replace(name="blind", backward=blind),
        STAND_IN,
    )
    q, k, v, _ = draw(PACKED)
    tile = Mask(window=9).tile(PACKED, PACKED)
    for call in plan(tile) * 2:
        assert library.provider_for(call, q, k, v) is STAND_IN
    assert len(tried) == 2 * len({call.kind for call in plan(tile)})  # asked once a kind


def flash_attention_3(off=1.0):
    """A stand-in for the library's module, whose outputs are `off` times what they are."""

    def problem(q, k, v, borders, causal, left, right, scale):
        lengths = [borders[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        assert [borders["max_seqlen_q"], borders["max_seqlen_k"]] == [max(x) for x in lengths]
        spans = tuple(Span(0, (0, n), (0, m)) for n, m in zip(*lengths, strict=True))
        assert causal == ((left, right) == (-1, 0))
        return Problem(q, k, v, Call(left, right, spans), scale, (borders["cu_seqlens_q"], borders["cu_seqlens_k"]))

    def forward(q, k, v, *, causal, softmax_scale, window_size_left, window_size_right, **borders):
        at = problem(q, k, v, borders, causal, window_size_left, window_size_right, softmax_scale)
        out, lse = stand_in_forward(at)
        return out * off, lse.T, None, None

    def backward(
        dout, q, k, v, out, lse, *, dq, dk, dv, is_causal, softmax_scale, window_size_left, window_size_right,
        deterministic, **borders,
    ):  # fmt: skip
        at = problem(q, k, v, borders, is_causal, window_size_left, window_size_right, softmax_scale)
        for into, gradient in zip((dq, dk, dv), stand_in_backward(at, dout, out, lse.T), strict=True):
            into.copy_(gradient)

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=9)])
def test_flash_attention_3_is_called_by_its_own_names(mask, providers, monkeypatch, caplog):
    first = next(each for each in library.PROVIDERS if each.name == "flash-attn 3")
    first = first._replace(takes=lambda call, device: True)
    q, k, v, dout = draw(PACKED)
    results = []
    for backend in ("library", "chunked"):
        providers(first)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_attention_3())
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = softmax_attention(*leaves, mask=mask, documents=PACKED, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()
    for wrong, told in ((flash_attention_3(1.05), "flash-attn 3 is off by 0.0"), (None, "flash-attn 3 not used for")):
        providers(first)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", wrong)
        with caplog.at_level(logging.INFO, logger="longreach"), pytest.raises(ValueError, match="no library is instal"):
            softmax_attention(q, k, v, mask=mask, documents=PACKED, backend="library")
        assert told in caplog.text


def test_why_libraries_do_not_serve(providers):
    q, k, v, _ = draw(PACKED)
    tile = Mask().tile(PACKED, PACKED)
    assert "no library is installed that serves causal attention on cpu" in str(library.refusal(q, k, v, tile))
    assert "not torch.float32" in str(library.refusal(q.float(), k.float(), v.float(), tile))
    layout = Layout(64, ranks=2, spans=16)
    documents = layout.documents(Documents.whole(1, 64), 0)
    q, k, v, _ = draw(documents)
    providers(STAND_IN)
    assert "calls" in str(library.refusal(q, k, v, Mask().tile(documents, documents)))
    with pytest.raises(ValueError, match="backend must be one that can run; got 'library'"):
        softmax_attention(q.float(), k.float(), v.float(), documents=documents, backend="library")
    providers()
    with pytest.raises(ValueError, match="ask `refusal` first"):
        library.attend(q, k, v, tile=Mask().tile(documents, documents), scale=1.0)


def test_every_choice_is_told_once_with_its_reason(providers, caplog, monkeypatch):
    providers(STAND_IN)
    monkeypatch.setattr(dispatch, "_announced", set())
    cut = Layout(64, ranks=2, spans=16).documents(Documents.whole(1, 64), 0)  # into many calls
    few, many = Mask().tile(PACKED, PACKED), Mask().tile(cut, cut)
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 64, 4, 8))
    with caplog.at_level(logging.INFO, logger="longreach"):
        for _ in range(2):
            softmax._implementation("library", *draw(PACKED)[:3], few)
            softmax._implementation("auto", *[on_cuda] * 3, many)
            softmax._implementation("auto", *[on_cuda] * 3, few, refusal=softmax.NO_DLSE)
            softmax._implementation("auto", *draw(PACKED)[:3], few)
    assert [record.getMessage() for record in caplog.records] == [
        "softmax_attention on cpu: stand-in, for causal attention",
        "softmax_attention on cpu: stand-in, for full attention",
        "softmax_attention on cuda: triton, not by a library: a tile takes more than 8 calls",
        "softmax_attention on cuda: triton, not by a library: there is a gradient of lse, which they do not take",
        "softmax_attention on cpu: chunked, chosen for this device",
    ]


def test_the_op_by_name_and_a_gradient_of_lse(providers):
    providers(STAND_IN)
    q, k, v, dout = draw(PACKED)
    results = []
    for backend in ("library", "chunked"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = softmax_attention(*leaves, documents=PACKED, return_lse=True, backend=backend)
        plain = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        loss = (out * dout).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        results.append((out, *plain, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(8, 8, 64, 64), (8, 2, 128, 128), (4, 4, 192, 128)])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=300, sink_tokens=4)])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("provider", library.PROVIDERS, ids=lambda provider: provider.name)
def test_libraries_on_a_gpu(provider, deterministic, mask, sizes, monkeypatch):
    monkeypatch.setattr(library, "_tested", {})
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        check_on_a_gpu(provider, mask, sizes)
    finally:
        torch.use_deterministic_algorithms(before)


def check_on_a_gpu(provider, mask, sizes):
    heads, groups, dim, value_dim = sizes
    for documents in (Documents.whole(2, 1024), Documents.from_lengths([[1, 700, 1300, 46], [1999]], 2048)):
        tile = mask.tile(documents, documents)
        inputs = draw(documents, heads=heads, groups=groups, dim=dim, value_dim=value_dim)
        q, k, v, dout = (x.cuda() for x in inputs)
        calls = plan(tile)
        if not all(provider.takes(call, q.device) and library._agrees(provider, call, q, k, v) for call in calls):
            pytest.skip(f"{provider.name} does not serve this here")
        wide = [x.double() for x in (q, k, v)]
        out, lse = reference.attend(*wide, tile=tile, scale=dim**-0.5)
        given = (out.float(), lse.float())
        found = library.attend(q, k, v, tile=tile, scale=dim**-0.5, provider=provider)
        gradient = Gradient(dout, *given)
        back = library.attend_backward(gradient, q, k, v, tile=tile, scale=dim**-0.5, provider=provider)
        again = library.attend_backward(gradient, q, k, v, tile=tile, scale=dim**-0.5, provider=provider)
        if torch.are_deterministic_algorithms_enabled():
            assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
        wanted = reference.attend_backward(Gradient(dout.double(), out, lse), *wide, tile=tile, scale=dim**-0.5)
        for a, b in zip((found[0], *back), (out, *wanted), strict=True):
            assert (a.double() - b).norm() <= 0.02 * b.norm()
