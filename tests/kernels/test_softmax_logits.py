"""What is done to the logits of softmax attention: soft capping and levels, by every backend, against the definition.

Triton's kernels run under the interpreter, with small blocks.
"""

import math

import pytest
import torch

from longreach.kernels import dispatch
from longreach.kernels.attend import Gradient, merge
from longreach.kernels.documents import Documents
from longreach.kernels.masks import BlockLocal, Dilated, Mask
from longreach.kernels.softmax import (
    LevelledAttend,
    LevelledInputs,
    bytes_sent,
    library,
    softmax_attention,
    state_bytes,
)
from longreach.kernels.softmax import triton as kernels

PACKED = Documents.from_lengths([[3, 40, 1, 13], [30]], 60)
MASKS = {
    "causal": Mask(),
    "window and sinks": Mask(window=9, sink_tokens=3),
    "every 3rd": Dilated(3),
    "blocks of 11": BlockLocal(11),
}
SMALL = kernels.Blockings(
    kernels.Blocks(32, 16, 4, 1), kernels.Blocks(32, 16, 4, 1), kernels.Blocks(16, 32, 4, 1)
)  # fmt: skip


def dense(q, k, v, levels, sinks, visible, softcap):
    """out and lse by the definition, for autograd. Levels fall, so that no weight overflows."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = q.shape[3] ** -0.5 * torch.einsum("bthk,bshk->bhts", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if levels is not None:
        levels = levels.repeat_interleave(q.shape[2] // levels.shape[2], 2).transpose(1, 2)
        scores = scores + levels[..., :, None] - levels[..., None, :]
    weights = scores.masked_fill(~visible[:, None], -math.inf).exp()
    total = weights.sum(-1) + sinks.exp()[:, None]
    return torch.einsum("bhts,bshv->bthv", weights / total[..., None], v), total.log().transpose(1, 2)


def draw(documents, levels, *, heads=4, groups=2, key_dim=24, value_dim=12, dtype=torch.float64, falls=1.0, seed=0):
    """q, k, v, levels (None for 0 of them) and sinks; levels are float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (documents.batch, documents.length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(*tokens, heads, key_dim), normal(*tokens, groups, key_dim), normal(*tokens, groups, value_dim)
    exact = torch.promote_types(dtype, torch.float32)
    level = -falls * torch.rand(*tokens, levels, generator=generator, dtype=torch.float64).cumsum(1) if levels else None
    sinks = normal(heads).to(exact)
    return [x.to(dtype) for x in (q, k, v)], None if level is None else level.to(exact), sinks


def op_and_gradients(q, k, v, levels, sinks, *, mask, documents, softcap, backend):
    """out, lse and every gradient, by a backend or, for None, by the definition."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, levels, sinks) if x is not None]
    q, k, v, *rest = leaves
    levels, sinks = rest if len(rest) == 2 else (None, *rest)
    if backend is None:
        results = dense(q, k, v, levels, sinks, mask.dense(documents, documents), softcap)
    else:
        results = softmax_attention(
            q, k, v, mask=mask, documents=documents, softcap=softcap, levels=levels, sink_logits=sinks,
            return_lse=True, backend=backend,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, douts)]


def error(found, expected):
    return max(
        float(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).detach())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("levels", "softcap"), [(4, None), (2, None), (0, 1.5), (4, 1.5)])
def test_every_gradient(mask, levels, softcap, backend):
    (q, k, v), level, sinks = draw(PACKED, levels)
    given = {"mask": MASKS[mask], "documents": PACKED, "softcap": softcap}
    found = op_and_gradients(q, k, v, level, sinks, backend=backend, **given)
    assert error(found, op_and_gradients(q, k, v, level, sinks, backend=None, **given)) < 1e-12


@pytest.mark.parametrize(("mask", "levels", "softcap"), [(Mask(), 2, None), (Mask(window=9, sink_tokens=3), 1, 1.5)])
def test_triton(mask, levels, softcap, monkeypatch):
    monkeypatch.setattr(kernels, "blockings", lambda *_: SMALL)
    documents = Documents.from_lengths([[3, 24, 13]], 43)
    (q, k, v), level, sinks = draw(documents, levels, heads=2, groups=1, dtype=torch.float32)
    given = {"mask": mask, "documents": documents, "softcap": softcap}
    found = op_and_gradients(q, k, v, level, sinks, backend="triton", **given)
    wide = [x.double() for x in (q, k, v, level, sinks)]
    assert error(found, op_and_gradients(*wide, backend=None, **given)) < 1e-5


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_levels_stay_exact_beside_bfloat16(backend, monkeypatch, repaired_bf16):
    """Levels as low as after thousands of tokens, which bfloat16 would round to multiples of 16."""
    monkeypatch.setattr(kernels, "blockings", lambda *_: SMALL)
    documents = Documents.whole(1, 40)
    (q, k, v), level, sinks = draw(documents, 2, heads=2, groups=1, dtype=torch.bfloat16, falls=0.1)
    given = {"mask": Mask(), "documents": documents, "softcap": None, "backend": backend}
    out, lse, *gradients = op_and_gradients(q, k, v, level - 3000, sinks, **given)
    wide = [x.double() for x in (q, k, v, level - 3000, sinks)]
    expected = op_and_gradients(*wide, **given | {"backend": None})
    assert error([lse], expected[1:2]) < 1e-4
    assert gradients[3].dtype == torch.float32
    assert error([out, *gradients], [expected[0], *expected[2:]]) < 2e-2
    assert error(gradients[3:4], expected[5:6]) < 1e-2


def test_levels_far_apart_neither_overflow_nor_vanish():
    """Between tokens where all is forgotten a query sees itself alone."""
    documents = Documents.whole(1, 40)
    (q, k, v), _, _ = draw(documents, 0, heads=2, groups=1, dtype=torch.float32)
    levels = -1e5 * torch.arange(40.0)[None, :, None].expand(1, 40, 2)
    for backend in ("chunked", "reference", "triton"):
        out = softmax_attention(q, k, v, levels=levels, backend=backend)
        torch.testing.assert_close(out, v.repeat_interleave(2, 2))


def test_queries_and_keys_of_different_tokens_merge_to_the_whole():
    (q, k, v), level, sinks = draw(PACKED, 4)
    op, part = LevelledAttend(Mask(), 0.3, 2.0), (slice(0, 25), slice(25, 60))
    inputs = LevelledInputs(q, k, v, level, level, sinks)

    def result(keys):
        tile = op.tile(PACKED, PACKED.slice(keys.start, keys.stop))
        return tile, tuple(x[:, keys] for x in (k, v, level))

    whole = op.attend(inputs, (k, v, level), op.tile(PACKED, PACKED), "auto")
    tiles = [result(keys) for keys in part]
    merged = merge(*(x for tile, sent in tiles for x in op.attend(inputs, sent, tile, "auto")))
    assert error(merged[:1], whole[:1]) < 1e-12
    gradient = Gradient(torch.randn_like(v.repeat_interleave(2, 2)), *whole)
    stay, travelled = op.attend_backward(gradient, inputs, (k, v, level), op.tile(PACKED, PACKED), "auto")
    parts = [op.attend_backward(gradient, inputs, sent, tile, "auto") for tile, sent in tiles]
    assert error([sum(each[0]["q"] for each in parts)], [stay["q"]]) < 1e-12
    assert error([torch.cat(x, 1) for x in zip(*(each[1] for each in parts), strict=True)], travelled) < 1e-12


@pytest.mark.slow
def test_gradcheck():
    documents = Documents.from_lengths([[3, 2], [4]], 5)
    (q, k, v), level, sinks = draw(documents, 2, heads=2, groups=1, key_dim=3, value_dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v, level, sinks)]

    def op(q, k, v, level, sinks):
        return softmax_attention(
            q, k, v, documents=documents, levels=level, sink_logits=sinks, softcap=2.0, return_lse=True
        )

    assert torch.autograd.gradcheck(op, leaves)


def test_libraries_are_not_chosen_for_levels_and_caps(monkeypatch):
    monkeypatch.setattr(library, "refusal", lambda *_: None)  # as if one were there
    documents = Documents.whole(1, 8)
    (q, k, v), level, _ = draw(documents, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backend must be one that can run; got 'library': they add no levels"):
        softmax_attention(q, k, v, levels=level, backend="library")
    with pytest.raises(ValueError, match="got 'library': they are not used to cap logits"):
        softmax_attention(q, k, v, softcap=30.0, backend="library")


def test_a_library_chosen_for_the_run_is_refused_before_any_rank_waits(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {"softmax_attention": "library"})
    (q, k, v), level, _ = draw(PACKED, 4)
    with pytest.raises(
        ValueError, match=r"kernels\.softmax_attention must be one that can run; got 'library': they add"
    ):
        LevelledAttend(Mask(), 1.0).check(LevelledInputs(q, k, v, level, level))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"levels": torch.zeros(2, 60, 4)}, "levels must be torch.float64 for q of torch.float64; got torch.float32"),
        ({"levels": torch.zeros(2, 60, 3).double()}, r"levels must be \[2, 60, 2 or 4\]"),
        ({"levels": torch.zeros(2, 59, 4).double()}, r"levels must be \[2, 60, 2 or 4\].*got \[2, 59, 4\]"),
        ({"key_levels": torch.zeros(2, 60, 4).double()}, "key_levels must come with levels"),
        (
            {"levels": torch.zeros(2, 60, 4).double(), "key_levels": torch.zeros(2, 60, 2).double()},
            "key_levels must have the heads of levels, 4; got 2",
        ),
        ({"softcap": 0.0}, "softcap must be more than 0; got 0.0"),
    ],
)
def test_inputs_that_do_not_fit(change, said):
    (q, k, v), _, _ = draw(PACKED, 0)
    with pytest.raises(ValueError, match=said):
        softmax_attention(q, k, v, documents=PACKED, **change)


def test_levels_are_counted_in_float32():
    sizes = {"kv_heads": 2, "key_dim": 24, "value_dim": 12, "levels": 4}
    assert state_bytes(100, **sizes) == 100 * (2 * 36 * 2 + 4 * 4)
    assert bytes_sent(100, ranks=3, **sizes) == 2 * 100 * (2 * 36 * 2 + 4 * 4)
