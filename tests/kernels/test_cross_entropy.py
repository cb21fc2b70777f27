"""Chunked cross entropy against torch's over the whole logits, and the memory that it promises."""

import pytest
import torch
from largest_tensor import LargestTensor
from torch.nn import functional as F

from longreach.kernels.pointwise import cross_entropy, loss_and_correct
from longreach.kernels.pointwise.cross_entropy import chunk_tokens


def inputs(tokens=63, width=12, vocabulary=40, dtype=torch.float64, batch=2):
    hidden = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (batch, tokens))
    targets[torch.rand(batch, tokens) < 0.3] = -100
    return hidden, weight, bias, targets


def whole(hidden, weight, bias, targets, logit_scale=1.0, softcap=None, reduction="sum"):
    logits = logit_scale * F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)


@pytest.mark.parametrize("chunk", [1, 10, 512])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.3, None), (0.3, 1.5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torch_with_gradients(with_bias, logit_scale, softcap, chunk):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    settings = {"logit_scale": logit_scale, "softcap": softcap}
    got = cross_entropy(hidden, weight, targets, bias=bias, chunk=chunk, **settings)
    want = whole(hidden, weight, bias, targets, **settings)
    loss, correct = loss_and_correct(hidden, weight, targets, chunk=chunk, **settings)
    torch.testing.assert_close(loss, whole(hidden, weight, None, targets, **settings).detach(), atol=1e-9, rtol=1e-9)
    assert correct == (F.linear(hidden, weight).argmax(-1) == targets).sum()
    losses, again = loss_and_correct(hidden, weight, targets, chunk=chunk, each=True, **settings)
    alone = whole(hidden, weight, None, targets, **settings, reduction="none").detach().view(targets.shape)
    torch.testing.assert_close(losses, alone, atol=1e-9, rtol=1e-9)
    assert torch.equal(again, F.linear(hidden, weight).argmax(-1) == targets)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    for a, b in zip(torch.autograd.grad(got / 7, tensors), torch.autograd.grad(want / 7, tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_gradcheck():
    hidden, weight, bias, targets = inputs(tokens=3, width=2, vocabulary=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: cross_entropy(h, w, targets, bias=b, chunk=2, logit_scale=0.7), (hidden, weight, bias)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(frozen):
    tensors = [x.detach() for x in inputs()[:2]]
    targets = inputs()[3]
    trained = tensors[1 - frozen].requires_grad_()
    (got,) = torch.autograd.grad(cross_entropy(tensors[0], tensors[1], targets, chunk=10), trained)
    (want,) = torch.autograd.grad(whole(tensors[0], tensors[1], None, targets), trained)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_without_any_target_the_loss_is_zero_with_zero_gradients():
    hidden, weight, _, targets = inputs()
    loss = cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bfloat16_sums_in_float32():
    hidden, weight, _, targets = inputs(tokens=300, width=32, dtype=torch.bfloat16)
    loss = cross_entropy(hidden, weight, targets, chunk=100)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = whole(*wide, None, targets)
    assert abs(loss.item() - want.item()) / want.item() < 0.01
    got = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(want, wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() / b.norm() < 0.02


def test_logits_of_a_chunk_are_the_most_that_exists():
    hidden, weight, _, targets = inputs(tokens=1000, width=8, vocabulary=300, dtype=torch.float32)
    with LargestTensor() as largest:
        cross_entropy(hidden, weight, targets, chunk=64).backward()
    assert largest.numel == 64 * 300


@pytest.mark.parametrize("chunk", [1, 10, 512])
def test_correct_predictions_are_counted_without_the_whole_logits(chunk):
    hidden, weight, _, targets = inputs()
    logits = hidden @ weight.t()
    targets[:, ::3] = logits.argmax(-1)[:, ::3]  # some are right
    targets[1, ::6] = -100
    with LargestTensor() as largest:
        loss, correct = loss_and_correct(hidden, weight, targets, chunk=chunk)
    assert largest.numel <= max(chunk * 40, hidden.numel())
    assert loss.item() == cross_entropy(hidden, weight, targets, chunk=chunk).item()
    right = [a == b for a, b in zip(logits.argmax(-1).flatten().tolist(), targets.flatten().tolist(), strict=True)]
    assert correct.item() == sum(right) > 20
    assert not loss.requires_grad


def test_gradients_are_kept_in_place_of_inputs():
    hidden, weight, _, targets = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = cross_entropy(hidden, weight, targets)
    assert sorted(x.numel() for x in kept) == sorted([hidden.numel(), weight.numel()])
    assert not any(x is y for x in kept for y in (hidden, weight))
    expected = torch.autograd.grad(whole(hidden, weight, None, targets), (hidden, weight))
    with torch.no_grad():  # as where an engine shards it in between
        weight.zero_()
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_bad_input():
    hidden, weight, bias, targets = inputs()
    for bad, message in [
        (lambda: cross_entropy(hidden, weight, targets[:, 1:]), "hidden must be"),
        (lambda: cross_entropy(hidden, weight[:, 1:], targets), "hidden must be"),
        (lambda: cross_entropy(hidden, weight.float(), targets), "one dtype"),
        (lambda: cross_entropy(hidden, weight, targets, bias=bias[1:]), "bias must be one for each of 40"),
        (lambda: cross_entropy(hidden, weight, targets, chunk=0), "chunk must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    for outside in (40, -1):
        with pytest.raises(RuntimeError):
            cross_entropy(hidden, weight, torch.full_like(targets, outside))


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "device", "tokens"),
    [
        (1024, torch.float32, "cpu", 2048),
        (1024, torch.bfloat16, "cpu", 2048),  # logits are float32 there
        (131_072, torch.float32, "cpu", 512),
        (32_768, torch.bfloat16, "cuda", 16_384),
        (131_072, torch.bfloat16, "cuda", 4096),
        (100_000, torch.bfloat16, "cuda", 4096),
        (131_072, torch.float32, "cuda", 2048),
    ],
)
def test_a_chunk_has_as_many_tokens_as_fit_its_memory(vocabulary, dtype, device, tokens):
    assert chunk_tokens(vocabulary, dtype, torch.device(device)) == tokens


def test_chunks_change_the_loss_by_rounding_alone():
    hidden, weight, _, targets = inputs(tokens=1200, dtype=torch.float32)
    results = []
    for chunk in (None, 512, 64):
        loss = cross_entropy(hidden, weight, targets, chunk=chunk)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-4, rtol=1e-5)
