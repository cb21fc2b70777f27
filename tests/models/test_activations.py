"""What saves memory changes nothing else: tiles of feed-forward layers, recomputation by mixer, offloading."""

import weakref
from functools import partial

import pytest
import torch
from model_presets import small_hybrid, tokens, total_loss
from torch import nn

from longreach.kernels.documents import Documents
from longreach.models.activations import offloading
from longreach.models.activations.recomputation import mode_of
from longreach.models.feed_forward.experts import MixtureOfExperts
from longreach.models.feed_forward.geglu import GEGLU
from longreach.models.feed_forward.mlp import MLP
from longreach.models.feed_forward.rwkv import RWKVChannelMixing
from longreach.models.feed_forward.sglu import SGLU
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.parallel.sequence import Sequence

LENGTH = 40
PACKED = Documents.from_lengths([[9, 22, 6], [LENGTH]], LENGTH)  # the first row ends in padding
FEED_FORWARD = {
    "swiglu": partial(SwiGLU, hidden=48, bias=True, gate_multiplier=0.5, down_multiplier=2.0),
    "clamped": partial(SwiGLU, hidden=48, limit=0.5),
    "geglu": partial(GEGLU, hidden=48),
    "sglu": partial(SGLU, hidden=48),
    "mlp": partial(MLP, hidden=48, bias=True),
    "rwkv": partial(RWKVChannelMixing, hidden=48),
    "experts": partial(
        MixtureOfExperts, hidden=24, experts=6, shared_hidden=16, shared_gate=True, balance=0.1, z=0.01, bias=True
    ),
}


def step(model):
    """The loss, every gradient, and the sums that parts report."""
    inputs = tokens(2, LENGTH)
    loss, _ = total_loss(model, inputs, Sequence.single(PACKED), inputs.roll(-1, 1))
    loss.backward()
    with torch.no_grad():
        reports = model(inputs, Sequence.single(PACKED), inputs, False, True)[-1]
    return [loss.detach(), *(p.grad for p in model.parameters()), *reports.values()]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_tiles_change_nothing(kind, checkpointing):
    settings = {"feed_forward": FEED_FORWARD[kind], "activation_checkpointing": checkpointing, "depth": 2}
    whole, in_tiles = (step(small_hybrid("lightning_attention", **settings, tile_tokens=tile)) for tile in (None, 7))
    torch.testing.assert_close(in_tiles, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_what_a_layer_in_tiles_makes_is_as_large_as_a_tile(kind, monkeypatch):
    seen, forward = [], nn.functional.linear

    def noted(x, *rest):
        seen.append(x.shape[:-1].numel())
        return forward(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", noted)
    model = small_hybrid("lightning_attention", feed_forward=FEED_FORWARD[kind], tile_tokens=7)
    layer = model.blocks[0].feed_forward
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x, Sequence.single(PACKED))
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert len(seen) >= 2 * 12  # twelve tiles, in forward and again in backward
    assert max(seen) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_tokens": 0}, "tile_tokens must be at least 1; got 0"),
        ({"tile_tokens": 8, "feed_forward": None}, "tile_tokens must be null for a model without feed-forward layer"),
        (
            {"activation_checkpointing": {"softmx": "full"}},
            "must name mixers of the model's pattern; got 'softmx'. Did you mean softmax",
        ),
        ({"activation_checkpointing": {"softmax": "some"}}, "must be one of none, full, mixing for each mixer"),
        ({"offload_activations": True}, "offload_activations must be false without activation_checkpointing"),
        (
            {"offload_activations": True, "activation_checkpointing": {"softmax": "none"}},
            "offload_activations must be false without activation_checkpointing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_hybrid("lightning_attention", **changes)


def test_of_several_mixers_in_a_layer_the_mode_that_keeps_least_counts():
    modes = {"a": "mixing", "b": "full"}
    assert [mode_of(modes, layer) for layer in ("a", "b", "c", "a+c", "a|b", "c+a|b")] == [
        "mixing", "full", "none", "mixing", "full", "full",
    ]  # fmt: skip
    assert mode_of("mixing", "c") == "mixing"


def runs_of_blocks(model):
    """How often each block runs in a step."""
    counts = [0] * len(model.blocks)
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    return counts


@pytest.mark.parametrize(
    ("modes", "runs"),
    [({"softmax": "full"}, [1, 2, 1, 2]), ({"lightning_attention": "mixing"}, [2, 1, 2, 1]), ({}, [1, 1, 1, 1])],
)
def test_recomputation_is_by_mixer(modes, runs):
    model = small_hybrid("lightning_attention", activation_checkpointing=modes)
    counts = runs_of_blocks(model)
    inputs = tokens(2, LENGTH)
    loss, _ = total_loss(model, inputs, Sequence.single(PACKED), inputs.roll(-1, 1))
    loss.backward()
    assert counts == runs
    plain = step(small_hybrid("lightning_attention"))
    for parameter, expected in zip(model.parameters(), plain[1:], strict=False):
        torch.testing.assert_close(parameter.grad, expected)


class Recorded:
    """Copies that stay on the host, and what was done in which order."""

    def __init__(self):
        self.events, self.sent = [], []

    def send(self, x):
        self.sent.append(weakref.ref(x.untyped_storage()))
        self.events.append(("send", len(self.sent) - 1))
        return len(self.sent) - 1, x.clone()

    def bring(self, sent):
        self.events.append(("bring", sent[0]))
        return sent

    def arrive(self, coming):
        self.events.append(("arrive", coming[0]))
        return coming[1]


def offloaded(mode, monkeypatch):
    monkeypatch.setattr(offloading, "LEAST_BYTES", 0)
    model = small_hybrid("lightning_attention", activation_checkpointing=mode, offload_activations=True)
    model.copies = Recorded()
    return model


def test_what_is_offloaded_leaves_and_comes_back_one_block_ahead(monkeypatch):
    model = offloaded("full", monkeypatch)
    inputs = tokens(2, LENGTH)
    loss, _ = model(inputs, Sequence.single(PACKED), inputs)
    assert [name for name, _ in model.copies.events] == ["send"] * 3  # the last block's input is needed at once
    assert all(storage() is None for storage in model.copies.sent)
    loss.backward()
    back = [event for event in model.copies.events if event[0] != "send"]
    assert back == [
        ("bring", 2), ("bring", 1), ("arrive", 2), ("bring", 0), ("arrive", 1), ("arrive", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("mode", "least"), [("full", 3), ("mixing", 6), ({"softmax": "mixing"}, 1)])
def test_offloading_changes_nothing(mode, least, monkeypatch):
    model = offloaded(mode, monkeypatch)
    torch.testing.assert_close(step(model), step(small_hybrid("lightning_attention")), atol=1e-12, rtol=1e-12)
    sent = {number for event, number in model.copies.events if event == "send"}
    assert len(sent) >= least
    assert sent == {number for event, number in model.copies.events if event == "arrive"}


def test_without_a_device_nothing_travels():
    model = small_hybrid("lightning_attention", activation_checkpointing="full", offload_activations=True)
    torch.testing.assert_close(step(model), step(small_hybrid("lightning_attention")), atol=1e-12, rtol=1e-12)


def on_cuda(offload):
    """Gradients of a step in bfloat16, and how much memory the forward keeps."""
    model = small_hybrid(
        "lightning_attention",
        dtype=torch.bfloat16,
        activation_checkpointing="full",
        offload_activations=offload,
        depth=8,
        width=256,
    ).cuda()
    documents = Documents.whole(1, 32768)
    inputs = torch.arange(32768, device="cuda").remainder(61).unsqueeze(0)
    for _ in range(2):  # what is derived, and pinned memory, are there the second time
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss, count = model(inputs, Sequence.single(documents), inputs)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        (loss / count).backward()
    return [p.grad for p in model.parameters()], kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_blocks_inputs_are_on_the_host():
    (stays, kept), (leaves, rest) = on_cuda(False), on_cuda(True)
    torch.testing.assert_close(leaves, stays)
    block_input = 32768 * 256 * 2
    assert rest <= kept - 6 * block_input  # of seven: an allocation may be rounded up
