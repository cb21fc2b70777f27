"""The ops as tests run them on ranks: inputs, calls and strategies, and how ranks are held against one device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from own_attention import BiasedAttend, Inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longreach.kernels.attention_free import AttentionFree, AttentionFreeInputs
from longreach.kernels.documents import Documents
from longreach.kernels.masks import Band, Bands, BlockLocal, Dilated, Mask, Pattern
from longreach.kernels.operation import Kept
from longreach.kernels.select_blocks import Rule
from longreach.parallel import ops
from longreach.parallel.collectives import sum_over_ranks
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import this_rank
from longreach.trainer.diagnosis.truth import plain_ops

# What the letters of a shape are. Eight heads: what tokens are exchanged for among up to eight ranks.
SMALL = {"H": 8, "G": 2, "K": 3, "V": 5, "D": 8, "N": 2}  # heads, grouped heads, key and value dims, channels, states
SCALE = 0.7  # of some cases, which is no default
Size = str | int | tuple[str | int, ...]  # a letter, a number, or the product of some
Shape = tuple[Size, ...]  # "T" comes first, or not at all


@dataclass(frozen=True)
class Case:
    """An op with the shapes of its inputs, without the batch, and how each is drawn: see `_draw`."""

    call: Callable[..., Tensor]
    inputs: tuple[tuple[Shape, str], ...]
    result: Shape
    by_heads: bool = True  # whether tokens can be exchanged for heads
    keys: bool = False  # whether keys can be gathered

    def draw(
        self, batch: int, length: int, generator: torch.Generator, sizes: dict[str, int] = SMALL
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs, and a gradient of the output, on the generator's device."""
        inputs = [_draw(_shape(shape, batch, length, sizes), kind, generator) for shape, kind in self.inputs]
        return inputs, _draw(_shape(self.result, batch, length, sizes), "normal", generator)


def _shape(shape: Shape, batch: int, length: int, sizes: dict[str, int]) -> tuple[int, ...]:
    def number(size: Size) -> int:
        if isinstance(size, tuple):
            return math.prod(map(number, size))
        return sizes[size] if isinstance(size, str) else size

    numbers = tuple(number(size) for size in shape if size != "T")
    return (batch, length, *numbers) if shape[:1] == ("T",) else numbers


def _draw(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)
    if kind == "direction":
        return torch.nn.functional.normalize(x, dim=-1)
    return {
        "normal": x,
        "small": 0.1 * x,
        "strong": 4 * x,
        "low": 4 * x - 1000,  # its exponential is nothing
        "decay": -0.3 * x.abs(),
        "gate": x.sigmoid(),
        "positive": 0.1 * x.abs(),
        "ridge": 0.25 + x.abs(),
    }[kind]


def _op(name: str, **settings: Any) -> Callable[..., Tensor]:
    """An op by its name, which `plain_ops` lets stand for the kernel."""

    def call(*inputs: Tensor, seq: Sequence) -> Tensor:
        return getattr(ops, name)(*inputs, seq=seq, **settings)

    return call


def _attend(scale: float | None = None, **mask: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, seq: Sequence) -> Tensor:
        return ops.softmax_attention(q, k, v, seq=seq, mask=Mask(**mask), sink_logits=sinks, scale=scale)

    return call


def _levelled(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, sinks: Tensor | None = None, *, seq: Sequence, **settings: Any
) -> Tensor:
    """Levels are exact numbers, whatever the type of queries."""
    levels = levels.to(torch.promote_types(q.dtype, torch.float32))
    return ops.softmax_attention(q, k, v, seq=seq, levels=levels, sink_logits=sinks, **settings)


def _attend_latents(**settings: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, latent: Tensor, expansion: Tensor, sinks: Tensor | None = None, *, seq: Sequence) -> Tensor:
        return ops.latent_attention(q, latent, expansion, seq=seq, sink_logits=sinks, **settings)

    return call


def _listed_latents(q: Tensor, latent: Tensor, *, seq: Sequence) -> Tensor:
    """Attention to the rows of seven tokens, those that the first head finds best."""
    rows = ops.window_means(latent.unsqueeze(2).detach(), seq=seq, size=1)
    lists = ops.select_blocks(q[:, :, :1], rows, seq=seq, rule=Rule(1, 7, score="dot", local=0))
    return ops.listed_latent_attention(q, latent, lists, seq=seq, latent_rank=5, block_size=1, scale=SCALE)


def _masked(mask: Pattern) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence) -> Tensor:
        return ops.softmax_attention(q, k, v, seq=seq, mask=mask)

    return call


def _whole(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence) -> Tensor:
    """Over sums of positive products, of all of a document's tokens."""
    return ops.kernel_attention(q.abs(), k.abs() + 0.1, v, seq=seq)


def own_attention(*inputs: Tensor, seq: Sequence) -> Tensor:
    """An op over keys that only the tests have."""
    return ops.attention(BiasedAttend, Inputs(*inputs), seq=seq)


def _attention_free(*inputs: Tensor, seq: Sequence) -> Tensor:
    return ops.attention(AttentionFree, AttentionFreeInputs(*inputs), seq=seq)


def _erase(q: Tensor, k: Tensor, v: Tensor, a: Tensor, gate: Tensor, decay: Tensor, *, seq: Sequence) -> Tensor:
    return ops.delta_rule(q, k, v, None, decay, erase=(-a, a * gate), seq=seq)


def _erase_key(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, decay: Tensor, *, seq: Sequence, first: bool = False
) -> Tensor:
    return ops.delta_rule(q, k, v, None, decay, erase=k * gate, erase_first=first, seq=seq)


def _bonus(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *, seq: Sequence) -> Tensor:
    return ops.gated_linear_attention(q, k, v, decay, bonus=bonus, read="exclusive", seq=seq)


def _divided(normaliser: str) -> Callable[..., Tensor]:
    """Over sums of positive products, which are not near 0."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        gate: Tensor | None = None,
        bonus: Tensor | None = None,
        *,
        seq: Sequence,
    ) -> Tensor:
        return ops.gated_linear_attention(
            q.abs() + 0.1, k.abs() + 0.1, v, decay, log_input=gate, bonus=bonus, normaliser=normaliser,
            read="inclusive" if bonus is None else "exclusive", seq=seq,
        )  # fmt: skip

    return call


def _longhorn(x: Tensor, delta: Tensor, b: Tensor, c: Tensor, *, seq: Sequence) -> Tensor:
    step = delta / (1 + delta * b.square().sum(-1, keepdim=True))
    return ops.selective_scan(x, step, None, b, c, seq=seq, decay="longhorn")


def _value_decay(q: Tensor, k: Tensor, v: Tensor, values: Tensor, *decay: Tensor, seq: Sequence) -> Tensor:
    return ops.gated_linear_attention(q, k, v, *decay, value_log_decay=values, seq=seq)


RULES = {
    "NSA": Rule(8, 4, window=4, stride=2, initial=1, local=2),
    "MoBA": Rule(8, 3, score="dot", pooled=False),
    "InfLLM-v2": Rule(8, 4, window=4, stride=2, aggregate="max", initial=1, local=2),
    "long windows": Rule(8, 4, window=16, stride=8),
    "short blocks": Rule(3, 5, window=6, stride=3, score="dot", aggregate="max", pooled=False, local=2),
}


def learned(x: Tensor, w: Tensor, *, seq: Sequence, size: int, stride: int) -> Tensor:
    """What a mixer does with the tokens of windows: something that is not linear and differs by place."""
    rows = ops.local_windows(x, seq=seq, size=size, stride=stride)
    made = torch.tanh((rows * w.view(1, 1, size, 1, 1)).sum(2)) + 1.0
    return ops.gather_windows(made, seq=seq, size=size, stride=stride)


def sparse_layer(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, seq: Sequence, rule: Rule = RULES["NSA"]) -> Tensor:
    """Attention to learned summaries, selection by them, attention to what is selected: every op as mixers use it.

    Every token also reads the summaries, as if it attended to all of them: so they have a gradient from every rank.
    """
    windows = {"size": rule.span, "stride": rule.step}
    summaries = learned(k, w, seq=seq, **windows) + ops.window_means(k, seq=seq, **windows)
    values = ops.window_means(v, seq=seq, slot="means of values", **windows)
    far, lse = ops.compressed_attention(q, summaries, values, seq=seq, scale=SCALE, **windows)
    lse = lse if rule.score == "softmax" else None
    lists = ops.select_blocks(q, summaries, seq=seq, rule=rule, scale=SCALE, lse=lse)
    out = far + ops.block_sparse_attention(
        q, k, v, lists, seq=seq, block_size=rule.block_size, scale=SCALE,
        dense_length=5 if rule.aggregate == "max" else 0,
    )  # fmt: skip
    weights = torch.arange(1.0, summaries.shape[1] + 1, dtype=q.dtype, device=q.device).cos().view(1, -1, 1, 1)
    return out + 0.1 * (summaries * weights).sum((1, 2, 3), keepdim=True)


_Q, _V, _OUT, _X = ("T", "H", "K"), ("T", "H", "V"), ("T", "H", "V"), ("T", "D")
_FEW = ("T", "G", "K")
_ATTENTION = ((_Q, "normal"), (_FEW, "normal"), (("T", "G", "V"), "normal"))
_LINEAR = ((_Q, "normal"), (_Q, "normal"), (_V, "normal"))
_GROUPED = ((_FEW, "normal"), (_FEW, "normal"), (_V, "normal"))
_BETA = (("T", "H"), "gate")
_DELTA = ((_Q, "normal"), (_Q, "direction"), (_V, "normal"), _BETA)
_BY_HEAD, _BY_CHANNEL = (("T", "H"), "decay"), (("T", "H", "K"), "decay")
_BY_VALUE = (("T", "H", "V"), "decay")
_GATE = (("T", "H"), "strong")
_SELECTIVE = ((("T", "N"), "normal"), (("T", "N"), "normal"))


def _latent(rank: int) -> tuple[tuple[Shape, str], ...]:
    """Queries, latents with two dims of the keys that heads share, and the expansion to a key and a value per head."""
    return (
        (("T", "H", 5), "normal"),
        (("T", 2 + rank), "normal"),
        ((("H", 8), rank), "small" if rank > 9 else "normal"),
    )


CASES = {
    "softmax": Case(_attend(), _ATTENTION, _OUT, keys=True),
    "window": Case(_attend(window=9, scale=SCALE), _ATTENTION, _OUT, keys=True),
    "short window": Case(_attend(window=1), _ATTENTION, _OUT, keys=True),
    "sinks": Case(_attend(window=5, sink_tokens=3), (*_ATTENTION, (("H",), "normal")), _OUT, keys=True),
    # A latent of few numbers travels to the ranks of all heads; a wide one is expanded before.
    "latent": Case(_attend_latents(scale=SCALE), (*_latent(4), (("H",), "normal")), _OUT, keys=True),
    "wide latent": Case(_attend_latents(mask=Mask(window=9)), _latent(50), _OUT, keys=True),
    "blocks of latents": Case(_listed_latents, ((("T", "H", 7), "normal"), (("T", 7), "normal")), _OUT, by_heads=False),
    "dilated": Case(_masked(Dilated(3)), _ATTENTION, _OUT, keys=True),
    "block-local": Case(_masked(BlockLocal(11)), _ATTENTION, _OUT, keys=True),
    "dilated window": Case(_masked(Dilated(4, window=23)), _ATTENTION, _OUT, keys=True),
    "near and every 5th": Case(
        _masked(Bands((Band(back=6, ahead=0), Band(ahead=-7, stride=5)))), _ATTENTION, _OUT, keys=True
    ),
    "levels": Case(_levelled, (*_ATTENTION, (("T", "H"), "strong"), (("H",), "normal")), _OUT, keys=True),
    "capped, levels of groups": Case(
        functools.partial(_levelled, softcap=1.5, mask=Dilated(3)),
        (*_ATTENTION, (("T", "G"), "strong")),
        _OUT,
        keys=True,
    ),
    "kernel attention": Case(_whole, _ATTENTION, _OUT, keys=True),
    "own attention": Case(own_attention, (*_LINEAR, (("T", "H"), "normal"), (("T", "H"), "normal")), _OUT, keys=True),
    "attention free": Case(
        _attention_free,
        (*[(("T", "D", 1), "normal")] * 3, *[(("T", 1, "K"), "normal")] * 2),
        ("T", "D", 1),
        keys=True,
    ),
    "undecayed": Case(_op("gated_linear_attention"), _LINEAR, _OUT),
    "constant decay": Case(_op("gated_linear_attention"), (*_LINEAR, (("H",), "decay")), _OUT),
    "constant channels": Case(_op("gated_linear_attention"), (*_LINEAR, (("H", "K"), "decay")), _OUT),
    "scalar decay": Case(_op("gated_linear_attention", scale=SCALE), (*_LINEAR, _BY_HEAD), _OUT),
    "channel decay": Case(_op("gated_linear_attention"), (*_LINEAR, _BY_CHANNEL), _OUT),
    "grouped": Case(_op("gated_linear_attention"), (*_GROUPED, _BY_HEAD), _OUT),
    "value decay": Case(_value_decay, (*_LINEAR, _BY_VALUE), _OUT),
    "both decays": Case(_value_decay, (*_LINEAR, _BY_VALUE, _BY_CHANNEL), _OUT),
    "bonus": Case(_bonus, (*_LINEAR, _BY_CHANNEL, (("H", "K"), "normal")), _OUT),
    "normaliser": Case(_divided("sum"), (*_LINEAR, _BY_HEAD), _OUT),
    "input gate": Case(_divided("at_least_one"), (*_LINEAR, _BY_HEAD, _GATE), _OUT),
    "input gate, bonus": Case(
        _divided("sum"), (*_LINEAR, (("H",), "decay"), (("T", "H"), "low"), (("H", "K"), "positive")), _OUT
    ),
    "delta": Case(_op("delta_rule"), _DELTA, _OUT),
    "gated delta": Case(
        _op("delta_rule", scale=SCALE),
        ((_FEW, "normal"), (_FEW, "direction"), *_DELTA[2:], _BY_HEAD),
        _OUT,
    ),
    "channel delta": Case(_op("delta_rule"), (*_DELTA, _BY_CHANNEL), _OUT),
    "delta of a key of its own": Case(
        _erase_key, ((_Q, "normal"), (_Q, "direction"), _DELTA[2], (_Q, "gate"), _BY_CHANNEL), _OUT
    ),
    "delta that erases first": Case(
        functools.partial(_erase_key, first=True),
        ((_Q, "normal"), (_Q, "direction"), _DELTA[2], (_Q, "gate"), _BY_HEAD),
        _OUT,
    ),
    "delta of two steps": Case(
        _op("delta_rule"),
        (
            (_FEW, "normal"),
            (("T", "G", 2, "K"), "direction"),
            (("T", "H", 2, "V"), "normal"),
            (("T", "H", 2), "gate"),
            _BY_HEAD,
        ),
        _OUT,
    ),
    "general delta": Case(_erase, (*_LINEAR, (_Q, "direction"), (_Q, "gate"), _BY_CHANNEL), _OUT),
    "scan": Case(_op("diagonal_scan"), ((_X, "normal"), (_X, "decay")), _X),
    "constant scan": Case(_op("diagonal_scan"), ((("T", "D", 3), "normal"), (("D", 3), "decay")), ("T", "D", 3)),
    "state space": Case(
        _op("diagonal_ssm"),
        ((("T", "H", 3), "normal"), (("H", "N"), "decay"), *[(("H", "N"), "normal")] * 3),
        ("T", "H", 3),
    ),
    "selective scan": Case(
        _op("selective_scan"), ((_X, "normal"), (_X, "positive"), (("D", "N"), "decay"), *_SELECTIVE), _X
    ),
    "longhorn": Case(_longhorn, ((_X, "normal"), (_X, "positive"), *_SELECTIVE), _X),
    "wkv": Case(_op("wkv"), ((_X, "low"), (_X, "normal"), (("D",), "decay"), (("D",), "normal")), _X),
    "wkv, token decay": Case(_op("wkv"), ((_X, "low"), (_X, "normal"), (_X, "decay")), _X),
    "log-linear attention": Case(
        _op("log_linear_attention", scale=SCALE), (*_GROUPED, _BY_HEAD, (("T", "H", 5), "normal")), _OUT
    ),
    "slot attention": Case(
        _op("slot_attention"),
        (*_LINEAR, *((("T", "H", 5), kind) for kind in ("positive", "decay"))),
        _OUT,
    ),
    "mesa": Case(
        _op("mesa"),
        ((_Q, "direction"), (_Q, "direction"), (_V, "normal"), _BY_HEAD, _BETA, (("H", "K"), "ridge")),
        _OUT,
    ),
    "slstm": Case(_op("slstm"), ((("T", "H", 4, "K"), "normal"), (("H", (4, "K", "K")), "small")), ("T", "H", "K")),
    "conv": Case(_op("short_conv"), ((_X, "normal"), (("D", 4), "normal")), _X, by_heads=False),
    "wide conv": Case(_op("short_conv"), ((_X, "normal"), (("D", 30), "normal")), _X, by_heads=False),
    "shift": Case(_op("token_shift"), ((_X, "normal"),), _X, by_heads=False),
    **{
        f"blocks of {name}": Case(
            functools.partial(sparse_layer, rule=rule), (*_ATTENTION, ((rule.span,), "normal")), _OUT, by_heads=False
        )
        for name, rule in RULES.items()
    },
}

# A strategy, and how many ranks exchange tokens for heads: all of them where it says 0.
STRATEGIES = {
    "default": (Strategy(), 1),
    "gather": (Strategy("gather"), 1),
    "ulysses": (Strategy("ulysses", "ulysses"), 0),
    "2-D, two by heads": (Strategy("ulysses", "ulysses"), 2),
    "2-D, four by heads": (Strategy("ulysses", "ulysses"), 4),
}


def fits(name: str, ranks: int, strategy: str) -> bool:
    """Whether a case runs under a strategy, and the strategy is not another one on so many ranks."""
    if strategy in ("default", "gather"):
        return strategy == "default" or CASES[name].keys
    by_heads, heads = STRATEGIES[strategy][1], SMALL["H"]
    return CASES[name].by_heads and (heads % ranks == 0 if by_heads == 0 else 1 < ranks // by_heads == ranks / by_heads)


def shared(world: int, spans: int, documents: Documents, strategy: str = "default") -> Sequence:
    """The rows as this rank holds them."""
    chosen, ulysses = STRATEGIES[strategy]
    mesh = Mesh.create if this_rank() else _mesh
    return Sequence.shared(documents, Layout(documents.length, world, spans), mesh(world, ulysses or world), chosen)


@functools.cache
def _mesh(world: int, ulysses: int) -> Mesh:
    return Mesh.create(world, ulysses)


def is_rows(x: Tensor) -> bool:
    """Whether an input has tokens, and is not a constant: `[H]`, `[H, K]`, weights."""
    return x.dim() >= 3


def local(inputs: list[Tensor], seq: Sequence) -> list[Tensor]:
    """What this rank holds of the inputs, to differentiate by."""
    return [(seq.shard(x) if is_rows(x) else x).clone().requires_grad_() for x in inputs]


Packing = tuple[tuple[int, ...], ...]  # lengths of the documents of each row; what is left is padding


@functools.lru_cache(8 * len(CASES))
def one_device(
    name: str, packing: Packing, length: int, seed: int, backend: str
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Inputs, the output's gradient, and what the kernels make of them on one device: output and gradients."""
    case, generator = CASES[name], torch.Generator().manual_seed(seed)
    inputs, dout = case.draw(len(packing), length, generator)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with plain_ops([], [""], backend):
        out = case.call(*leaves, seq=Sequence.single(Documents.from_lengths(packing, length)))
    return inputs, dout, out.detach(), list(torch.autograd.grad(out, leaves, dout))


def agree(
    rank: int,
    world: int,
    names: list[str],
    packings: list[Packing],
    length: int,
    spans: int,
    strategy: str = "default",
    seed: int = 0,
    keep: bool = False,
    backend: str = "auto",
) -> None:
    """Ranks agree with one device on output and all gradients; `keep`: also where a forward is recomputed."""
    for name in names:
        for packing in packings:
            call, (inputs, dout, out, gradients) = CASES[name].call, one_device(name, packing, length, seed, backend)
            seq = shared(world, spans, Documents.from_lengths(packing, length), strategy)
            here = local(inputs, seq)
            if keep:
                seq = replace(seq, kept=Kept())
                found = checkpoint(lambda *x, call=call, seq=seq: call(*x, seq=seq), *here, use_reentrant=False)
            else:
                found = call(*here, seq=seq)
            found.backward(seq.shard(dout))
            close(found, seq.shard(out), f"{name}, output")
            for index, (x, whole, gradient) in enumerate(zip(here, inputs, gradients, strict=True)):
                if is_rows(whole):
                    gradient = seq.shard(gradient)
                elif world > 1:
                    sum_over_ranks(x.grad, seq)
                close(x.grad, gradient, f"{name}, gradient of input {index}")


def close(found: Tensor | None, expected: Tensor, what: str) -> None:
    assert found is not None, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda text: f"{what}: {text}")
