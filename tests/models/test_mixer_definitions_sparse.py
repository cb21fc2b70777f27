"""NSA, MoBA and InfLLM-v2 against their definitions, written densely and token by token; and against full attention."""

import math

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees

from longreach.kernels.documents import Documents
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.models.mixers.sparse.block_sparse_attention import InfLLMv2, MoBA
from longreach.models.mixers.sparse.native_sparse_attention import NativeSparseAttention
from longreach.parallel.sequence import Sequence

WIDTH, LENGTHS = 24, [37, 3, 1, 23]
SIZES = {"width": WIDTH, "heads": 4, "kv_heads": 2}


def built(mixer):
    mixer = mixer.double()
    randomise(mixer)
    return mixer


def packed(lengths=LENGTHS):
    torch.manual_seed(0)
    seq = Sequence.single(Documents.from_lengths([lengths]))
    return torch.randn(1, sum(lengths), WIDTH, dtype=torch.float64, requires_grad=True), seq


def by_document(function, x, lengths=LENGTHS):
    """A definition for one document `[T, width]`, applied to each of the row."""
    return torch.cat([function(part) for part in x[0].split(lengths)]).unsqueeze(0)


def assert_same(name, mixer, definition, lengths=LENGTHS):
    """Outputs and all gradients, of the parameters and of the input."""
    x, seq = packed(lengths)
    out = mixer(x, seq)
    expected = by_document(definition, x, lengths)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    wanted = [x, *(p for p in mixer.parameters())]
    dout = torch.randn_like(out)
    found = [[of.detach(), *torch.autograd.grad(of, wanted, dout)] for of in (out, expected)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert_agrees(name, "dense definition, token by token", *found)


def attention(q, k, v, seen, scale):
    """q `[T, H, K]`, k, v `[S, G, …]`, seen bool `[H, T, S]`; nothing where nothing is seen."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (scale * torch.einsum("thk,shk->hts", q, k)).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shv->thv", weights, v), weights


def rotated(mixer, x):
    """`[T, heads, D]` at positions 0, 1, …, by complex numbers."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(half).double() / half)
    torch.testing.assert_close(mixer.rotary.rotation.frequencies()[0].double(), frequencies, rtol=1e-6, atol=0)
    angles = torch.arange(len(x)).double()[:, None] * mixer.rotary.rotation.frequencies()[0].double()
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def tokens_of(lists, size):
    """bool `[H, T, T]`: causal, and in a block that is listed; lists are sets, `[H][T]`."""
    length = len(lists[0])
    return torch.tensor(
        [[[j <= t and j // size in of_head[t] for j in range(length)] for t in range(length)] for of_head in lists]
    )


def best(scores, forced, count):
    """The forced ones and the highest, lower ids first among equals."""
    order = sorted(scores, key=lambda b: (b not in forced, -scores[b], b))
    return set(order[:count]) | set(forced)


@pytest.mark.parametrize(("size", "top_k"), [(8, 2), (8, 1), (4, 3), (16, 9)])
def test_moba_is_its_definition(size, top_k):
    mixer = built(MoBA(**SIZES, block_size=size, top_k=top_k))

    def definition(x):
        q, k, v = (project(x).unflatten(-1, (-1, 6)) for project in (mixer.query, mixer.key, mixer.value))
        q, k = rotated(mixer, q), rotated(mixer, k)
        lists = []
        for head in range(4):
            of_head = []
            for t in range(len(x)):
                own = t // size
                means = {b: k[b * size : (b + 1) * size, head // 2].mean(0) for b in range(own)}
                scores = {b: (q[t, head] @ mean).item() for b, mean in means.items()}
                of_head.append(best(scores | {own: math.inf}, [own], top_k))
            lists.append(of_head)
        return mixer.output(attention(q, k, v, tokens_of(lists, size), 6**-0.5)[0].flatten(1))

    assert_same("moba", mixer, definition)


@pytest.mark.parametrize("dense_length", [0, 9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_infllm_v2_is_its_definition(count, dense_length):
    size, window, stride = 8, 4, 2
    mixer = built(
        InfLLMv2(
            **SIZES, block_size=size, count=count, window_size=window, window_stride=stride, initial=1, local=1,
            dense_length=dense_length,
        )
    )  # fmt: skip

    def definition(x):
        q, k, v = (project(x).unflatten(-1, (-1, 6)) for project in (mixer.query, mixer.key, mixer.value))
        q, k = rotated(mixer, q), rotated(mixer, k)
        lists = []
        for group in range(2):
            of_group = []
            for t in range(len(x)):
                own = t // size
                starts = range(0, t - window + 2, stride)
                scores = dict.fromkeys(range(own + 1), -1.0)
                if len(starts):
                    means = torch.stack([k[s : s + window, group].mean(0) for s in starts])
                    weights = sum((6**-0.5 * means @ q[t, h]).softmax(0) for h in (2 * group, 2 * group + 1))
                    for b in scores:
                        touching = [i for i, s in enumerate(starts) if s < (b + 1) * size and s + window > b * size]
                        scores[b] = max((weights[i].item() for i in touching), default=-1.0)
                listed = {b for b in best(scores, {0, own}, count) if scores[b] >= 0 or b in (0, own)}
                of_group.append(set(range(own + 1)) if t < dense_length else listed)
            lists += [of_group, of_group]
        return mixer.output(attention(q, k, v, tokens_of(lists, size), 6**-0.5)[0].flatten(1))

    assert_same("infllm_v2", mixer, definition)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (4, 4)])
def test_nsa_is_its_definition(window, stride, compression, shared_kv):
    size, count, near = 8, 3, 5
    mixer = built(
        NativeSparseAttention(
            **SIZES, value_dim=5, window_size=window, window_stride=stride, block_size=size, count=count, initial=1,
            local=1, near=near, compression=compression, shared_kv=shared_kv,
        )
    )  # fmt: skip

    def compressed(parts, phi):
        if phi is None:
            return parts.mean(0)
        rows = (parts + phi.places.unsqueeze(1)).transpose(0, 1).flatten(1)
        return phi.second(torch.nn.functional.gelu(phi.first(rows)))

    def definition(x):
        length = len(x)
        q = mixer.query(x).unflatten(-1, (4, 6))
        keys = mixer.key(x).unflatten(-1, (-1, 2, 6)).expand(-1, 3, -1, -1)
        values = mixer.value(x).unflatten(-1, (-1, 2, 5)).expand(-1, 3, -1, -1)
        starts = list(range(0, length - window + 1, stride))
        far, weights = torch.zeros(length, 4, 5, dtype=torch.float64), torch.zeros(4, length, 0)
        if starts:
            k = torch.stack([compressed(keys[s : s + window, 0], mixer.compress_keys) for s in starts])
            v = torch.stack([compressed(values[s : s + window, 0], mixer.compress_values) for s in starts])
            past = torch.tensor([[s + window - 1 <= t for s in starts] for t in range(length)])
            far, weights = attention(q, k, v, past.expand(4, -1, -1), 6**-0.5)
        lists = []
        for group in range(2):
            of_group = []
            for t in range(length):
                own, scores = t // size, {}
                for b in range(own + 1):  # the sum as the paper has it
                    indices = [
                        size // stride * b + m - n for m in range(size // stride) for n in range(window // stride)
                    ]
                    inside = [i for i in indices if 0 <= i < len(starts) and starts[i] + window - 1 <= t]
                    scores[b] = weights[2 * group : 2 * group + 2, t, inside].sum().item() if inside else -1.0
                of_group.append({b for b in best(scores, {0, own}, count) if scores[b] >= 0 or b in (0, own)})
            lists += [of_group, of_group]
        turned = rotated(mixer, q)
        chosen, _ = attention(turned, rotated(mixer, keys[:, 1]), values[:, 1], tokens_of(lists, size), 6**-0.5)
        band = torch.tensor([[0 <= t - j < near for j in range(length)] for t in range(length)])
        last, _ = attention(turned, rotated(mixer, keys[:, 2]), values[:, 2], band.expand(4, -1, -1), 6**-0.5)
        gates = mixer.gate(x).sigmoid().unflatten(-1, (4, 3))
        out = gates[..., :1] * far + gates[..., 1:2] * chosen + gates[..., 2:] * last
        return mixer.output(out.flatten(1))

    assert_same("native_sparse_attention", mixer, definition)


@pytest.mark.parametrize(
    "sparse",
    [
        lambda: MoBA(**SIZES, block_size=8, top_k=8),
        lambda: InfLLMv2(**SIZES, block_size=8, count=8, window_size=4, window_stride=2, local=8 - 1, dense_length=0),
        lambda: InfLLMv2(**SIZES, block_size=8, count=2, window_size=4, window_stride=2, local=1, dense_length=60),
        lambda: MoBA(**SIZES, block_size=8, top_k=1, dense_steps=3),
    ],
    ids=["MoBA of all blocks", "InfLLM-v2 of all blocks", "InfLLM-v2 of dense length", "MoBA in its dense steps"],
)
def test_what_sees_everything_is_softmax_attention_with_its_weights(sparse):
    sparse, dense = built(sparse()), built(SoftmaxAttention(**SIZES))
    assert sparse.load_state_dict(dense.state_dict()) == ([], [])
    sparse.at_step(2)
    x, seq = packed()
    torch.testing.assert_close(sparse(x, seq), dense(x, seq), rtol=0, atol=1e-12)
    assert getattr(sparse, "dense", False) == (sparse.dense_steps > 2)


def test_steps_of_dense_attention_end():
    mixer = built(MoBA(**SIZES, block_size=8, top_k=1, dense_steps=3))
    x, seq = packed()
    outputs = []
    for step in (0, 2, 3):
        mixer.at_step(step)
        outputs.append((mixer(x, seq), mixer.mixing_flops(seq)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.allclose(outputs[1][0], outputs[2][0])
    assert outputs[1][1] != outputs[2][1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoBA(**SIZES, top_k=0), "top_k must be at least 1"),
        (lambda: MoBA(**SIZES, dense_steps=-1), "dense_steps must not be negative"),
        (lambda: InfLLMv2(**SIZES, dense_length=-1), "dense_length must not be negative"),
        (lambda: InfLLMv2(**SIZES, count=2, local=4), "count must have room for the forced blocks"),
        (lambda: NativeSparseAttention(**SIZES, window_stride=24), "stride must divide window and block_size"),
        (lambda: NativeSparseAttention(**SIZES, compression="max"), "compression must be one of mlp, mean"),
        (lambda: NativeSparseAttention(**SIZES, compression="mean", compression_hidden=8), "compression_hidden must"),
        (lambda: NativeSparseAttention(width=24, heads=4, kv_heads=3), "kv_heads must divide heads=4; got 3"),
        (lambda: NativeSparseAttention(**SIZES, near=0), "window must be at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
