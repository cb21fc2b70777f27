"""Keys, values and memories that several layers read: ranks, recomputation, prompts and what decoding keeps."""

import weakref
from functools import cache, partial

import pytest
import torch
from distributed import run_threads
from model_presets import WIDTH, feed_forward, in_pieces, randomise, tokens

from longreach.kernels.documents import Documents
from longreach.models.decoding import next_logits
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.elementwise.gated_memory_unit import GatedMemoryUnit
from longreach.models.mixers.softmax.cross_attention import CrossAttention
from longreach.models.mixers.softmax.differential_attention import DifferentialAttention
from longreach.models.mixers.softmax.key_values import KeyValues
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import MoBA
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.models.part import flops_of
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.parallel.strategy import Strategy

LENGTH = 48
PACKED = Documents.from_lengths([[9, 22, 1, 11], [LENGTH]], LENGTH)
ATTENTION = partial(SoftmaxAttention, heads=4)
MODELS = {
    # Windows in pairs, the full layers all alike: two publishers of one name, and a reader far from its own.
    "cla": {
        "pattern": ["window*2", "full", "window*2", "full"],
        "mixers": {
            "window": partial(ATTENTION, kv_heads=1, window=7, share=2, sink_logits=True),
            "full": partial(ATTENTION, kv_heads=2, qk_norm="head", share=8),
        },
        "feed_forward": feed_forward(),
    },
    # A window that publishes for a reader with a wider one, of another number of query heads, with a convolution.
    "wider": {
        "pattern": ["window", "wide", "window", "wide"],
        "mixers": {
            "window": partial(ATTENTION, kv_heads=2, window=5, share=1),
            "wide": partial(SoftmaxAttention, heads=2, head_dim=8, window=11, keys_of="window", conv_size=3),
        },
        "feed_forward": feed_forward(),
    },
    "yoco": {
        "pattern": ["window|mlp", "window|mlp|keys", "cross|mlp*2"],
        "mixers": {
            "window": partial(ATTENTION, kv_heads=1, window=7),
            "mlp": feed_forward(),
            "keys": partial(KeyValues, kv_heads=2, head_dim=8),
            "cross": partial(ATTENTION, keys_of="keys"),
        },
    },
    # The memory of the second Mamba layer, and the keys of the one full layer.
    "samba_y": {
        "pattern": ["mamba", "window", "mamba", "full", "memory", "full"],
        "mixers": {
            "mamba": partial(Mamba, expansion=1, state=4, step_rank=3, publish=True),
            "window": partial(ATTENTION, kv_heads=1, window=7),
            "full": partial(DifferentialAttention, heads=2, kv_heads=1, share=8),
            "memory": partial(GatedMemoryUnit, memory_of="mamba", expansion=1),
        },
        "feed_forward": feed_forward(),
    },
}  # fmt: skip


def build(name, **changes):
    settings = {**MODELS[name], **changes}
    depth = settings.pop("depth", 6 if name in ("cla", "samba_y") else 4)
    model = LanguageModel(vocabulary=61, width=WIDTH, depth=depth, **settings).double()
    randomise(model)
    return model


def batch():
    targets = tokens(2, LENGTH).roll(-1, dims=1)
    targets[0, [8, 30, 31]] = targets[0, 42:] = targets[1, -1] = -100
    return tokens(2, LENGTH), targets


def loss_and_gradients(name, seq, checkpointing="none"):
    model, (inputs, targets) = build(name, activation_checkpointing=checkpointing), batch()
    loss, _ = model(seq.shard(inputs), seq, seq.shard(targets))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@cache
def on_one(name):
    return loss_and_gradients(name, Sequence.single(PACKED))


def on_one_of(rank, world, name, spans, checkpointing, strategy):
    mesh = Mesh.create(world, ulysses=world if strategy == "ulysses" else 1)
    seq = Sequence.shared(PACKED, Layout(LENGTH, world, spans), mesh, Strategy(attention=strategy))
    return loss_and_gradients(name, seq, checkpointing)


# Ranks and recomputation.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", ["full", "mixing"])
def test_recomputation_sums_the_gradients_of_all_readers(name, checkpointing):
    found = loss_and_gradients(name, Sequence.single(PACKED), checkpointing)
    torch.testing.assert_close(found, on_one(name), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "world", "spans", "checkpointing", "strategy"),
    [
        ("cla", 2, 2, "full", "ring"),
        ("cla", 3, 1, "none", "gather"),
        ("cla", 4, 2, "mixing", "ring"),
        ("wider", 3, 2, "full", "ring"),
        ("yoco", 2, 1, "mixing", "ulysses"),
        ("yoco", 3, 2, "none", "ring"),
        ("yoco", 4, 1, "full", "gather"),
        ("samba_y", 3, 2, "mixing", "ring"),
    ],
)
def test_ranks_give_what_one_gives(name, world, spans, checkpointing, strategy):
    parts = run_threads(world, on_one_of, name, spans, checkpointing, strategy)
    total = [torch.stack(each).sum(0) for each in zip(*parts, strict=True)]
    torch.testing.assert_close(total, on_one(name), atol=1e-9, rtol=1e-9)


# Decoding.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [9, 1, 1, 20, 1, 16]], ids=["steps", "mixed"])
@torch.no_grad()
def test_decoding_gives_the_full_forward(name, lengths):
    model, inputs = build(name), tokens(2, LENGTH)
    expected = model(inputs, Sequence.single(Documents.whole(2, LENGTH)))
    torch.testing.assert_close(in_pieces(model, inputs, lengths), expected, atol=1e-9, rtol=1e-9)


def kept_bytes(cache):
    """Of rows that are kept, each once, without the room for more."""
    rows = {id(rows): rows for each in (cache, *cache._parts.values()) for rows in each.rows.values()}.values()
    return sum(each.kept * sum(x[0, 0].numel() * x.element_size() for x in each.tensors) for each in rows)


@pytest.mark.parametrize(
    ("name", "numbers"),
    # Per token or row of a window: of the layers that make keys alone, one head of 8 or two, keys and values.
    [
        ("cla", {"all": 2 * 16, "window": 2 * 2 * 8, "rows": 7}),
        ("wider", {"all": 0, "window": 2 * 2 * 16, "rows": 11}),
        ("yoco", {"all": 2 * 16, "window": 2 * 2 * 8, "rows": 6}),
        ("samba_y", {"all": 2 * 16, "window": 2 * 8, "rows": 6}),
    ],
)
def test_keys_are_kept_once_for_all_their_readers(name, numbers):
    """A window that is read by others is given up when the next rows come, so that it has one row more until then."""
    model, decoded = build(name), DecodingCache()
    for start, stop in [(0, 30), *((t, t + 1) for t in range(30, 40))]:
        next_logits(model, tokens(1, LENGTH)[:, start:stop], decoded)
    assert kept_bytes(decoded) == 8 * (40 * numbers["all"] + numbers["rows"] * numbers["window"])
    assert set(decoded.rows) == set()  # all slots belong to parts


@pytest.mark.parametrize(("name", "tail"), [("yoco", 2), ("cla", 4), ("wider", 4), ("samba_y", 4)])
@torch.no_grad()
def test_a_prompt_runs_through_stateless_layers_for_its_last_token_alone(name, tail):
    """What is decoded after it is that of the full forward too; a layer with a convolution keeps a state."""
    model, inputs, cache, seen = build(name), tokens(2, LENGTH), DecodingCache(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, outputs: seen.append(arguments[0].shape[1]))
    expected = model(inputs, Sequence.single(Documents.whole(2, LENGTH)))
    for start, stop in [(0, 30), (30, 31), (31, 45), (45, 46)]:
        seen.clear()
        found = next_logits(model, inputs[:, start:stop], cache)
        torch.testing.assert_close(found, expected[:, stop - 1], atol=1e-9, rtol=1e-9)
        assert seen == [stop - start] * tail + [1] * (model.depth - tail)


# What a reader costs, and what is let go.


def test_a_reader_has_neither_keys_nor_their_flops():
    model, seq = build("cla"), Sequence.single(PACKED)
    first, second = model.mixers[:2]
    assert {name for name, _ in second.named_children()} == {"query", "output"}
    assert first.mixing_flops(seq) == second.mixing_flops(seq)
    linear = 2 * seq.places * 2 * WIDTH * 8  # one key/value head
    assert first.flops(seq) - second.flops(seq) == linear == flops_of(first.key, seq) + flops_of(first.value, seq)


@torch.no_grad()
def test_what_is_published_is_let_go_after_its_last_reader():
    model, alive, made = build("yoco", depth=4), [], []
    model.blocks[1].mixer_3.register_forward_hook(
        lambda module, arguments, outputs: made.append(weakref.ref(outputs[1]))
    )
    model.norm.register_forward_hook(lambda *_: alive.append(made[0]() is not None))
    model.blocks[3].register_forward_pre_hook(lambda *_: alive.append(made[0]() is not None))
    model.hidden(tokens(1, LENGTH), Sequence.single(Documents.whole(1, LENGTH)))
    assert alive == [True, False]


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (partial(ATTENTION, share=0), "share must be at least 1; got 0"),
        (partial(ATTENTION, share=2, keys_of="it"), "keys_of must come without share"),
        (partial(ATTENTION, kv_heads=2, keys_of="it"), "keys_of must come without share and kv_heads"),
        (partial(ATTENTION, keys_of="other"), "got no other.keys, other.values from the layers before"),
        (partial(MoBA, heads=4, share=2), "share and keys_of must be null for MoBA"),
        (
            partial(CrossAttention, heads=4, memory_of="it", share=2),
            "share and keys_of must be null for CrossAttention",
        ),
        (partial(KeyValues, kv_heads=0, head_dim=8), "kv_heads must be at least 1; got 0"),
        (partial(GatedMemoryUnit, memory_of="it"), "got no it.memory from the layers before GatedMemoryUnit"),
        (partial(GatedMemoryUnit, memory_of="it", expansion=0.01), "expansion must leave at least one channel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(mixer, message):
    with pytest.raises(ValueError, match=message):
        build("cla", mixers={"it": mixer}, pattern=["it"])


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "yoco",
            {"cross": partial(ATTENTION, keys_of="keys", head_dim=16)},
            "cross must read keys.keys as wide",
        ),
        (
            "samba_y",
            {"memory": partial(GatedMemoryUnit, memory_of="mamba")},
            "memory must read mamba.memory",
        ),
    ],
)
def test_what_is_read_in_another_width_is_refused(name, changed, message):
    with pytest.raises(ValueError, match=message):
        build(name, mixers={**MODELS[name]["mixers"], **changed})
