"""Ops as they are drawn on ranks: inputs, calls, and what strategies they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.kernels.mask import Mask
from longreach.parallel import ops

HEADS, GROUPS, KEY, VALUE, CHANNELS, STATES = 4, 2, 3, 5, 8, 2
TIME = -1  # stands for the length of the row in a shape


@dataclass(frozen=True)
class Case:
    """An op with the shapes of its inputs: `(…, kind)`, without the batch; "normal", "decay", "gate", "positive"."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    result: tuple[int, ...]
    by_heads: bool = True  # whether tokens can be exchanged for heads
    keys: bool = False  # whether keys can be gathered

    def inputs(self, batch: int, length: int, generator: torch.Generator) -> list[Tensor]:
        return [_draw(_shape(shape, batch, length), kind, generator) for shape, kind in self.shapes]

    def output(self, batch: int, length: int) -> tuple[int, ...]:
        return _shape(self.result, batch, length)


def _shape(shape: tuple[int, ...], batch: int, length: int) -> tuple[int, ...]:
    return (batch, length, *shape[1:]) if shape[0] == TIME else shape


def _draw(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    if kind == "direction":
        return torch.nn.functional.normalize(x, dim=-1)
    return {"normal": x, "decay": -0.3 * x.abs(), "gate": x.sigmoid(), "positive": 0.1 * x.abs()}[kind]


def is_constant(x: Tensor, length: int) -> bool:
    """Whether an input has no time: `[H]`, `[H, K]`, weights."""
    return x.dim() < 3


def _attend(**mask: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, seq: Any) -> Tensor:
        return ops.softmax_attention(q, k, v, seq=seq, mask=Mask(**mask), sink_logits=sinks)

    return call


def _erase(q: Tensor, k: Tensor, v: Tensor, a: Tensor, gate: Tensor, decay: Tensor, *, seq: Any) -> Tensor:
    return ops.delta_rule(q, k, v, None, decay, erase=(-a, a * gate), seq=seq)


def _bonus(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, *, seq: Any) -> Tensor:
    return ops.gated_linear_attention(q, k, v, decay, bonus=bonus, read="exclusive", seq=seq)


def _input_gate(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor, *, seq: Any) -> Tensor:
    return ops.gated_linear_attention(
        q.abs() + 0.1, k.abs() + 0.1, v, decay, log_input=gate, normaliser="at_least_one", seq=seq
    )


def _selective(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, seq: Any) -> Tensor:
    return ops.selective_scan(x, delta, a, b[:, :, 0], c[:, :, 0], seq=seq)


def _value_decay(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, seq: Any) -> Tensor:
    return ops.gated_linear_attention(q, k, v, value_log_decay=decay, seq=seq)


_Q, _V, _OUT = (TIME, HEADS, KEY), (TIME, HEADS, VALUE), (TIME, HEADS, VALUE)
_ATTENTION = ((_Q, "normal"), ((TIME, GROUPS, KEY), "normal"), ((TIME, GROUPS, VALUE), "normal"))
_LINEAR = ((_Q, "normal"), (_Q, "normal"), (_V, "normal"))
_DELTA = ((_Q, "normal"), (_Q, "direction"), (_V, "normal"), ((TIME, HEADS), "gate"))
_X = (TIME, CHANNELS)

CASES = {
    "softmax": Case(_attend(), _ATTENTION, _OUT, keys=True),
    "window": Case(_attend(window=4), _ATTENTION, _OUT, keys=True),
    "sinks": Case(_attend(window=3, sink_tokens=2), (*_ATTENTION, ((HEADS,), "normal")), _OUT, keys=True),
    "undecayed": Case(ops.gated_linear_attention, _LINEAR, _OUT),
    "constant decay": Case(ops.gated_linear_attention, (*_LINEAR, ((HEADS,), "decay")), _OUT),
    "scalar decay": Case(ops.gated_linear_attention, (*_LINEAR, ((TIME, HEADS), "decay")), _OUT),
    "channel decay": Case(ops.gated_linear_attention, (*_LINEAR, ((TIME, HEADS, KEY), "decay")), _OUT),
    "value decay": Case(_value_decay, (*_LINEAR, ((TIME, HEADS, VALUE), "decay")), _OUT),
    "bonus": Case(_bonus, (*_LINEAR, ((TIME, HEADS, KEY), "decay"), ((HEADS, KEY), "normal")), _OUT),
    "input gate": Case(_input_gate, (*_LINEAR, ((TIME, HEADS), "decay"), ((TIME, HEADS), "normal")), _OUT),
    "delta": Case(ops.delta_rule, _DELTA, _OUT),
    "gated delta": Case(ops.delta_rule, (*_DELTA, ((TIME, HEADS), "decay")), _OUT),
    "channel delta": Case(ops.delta_rule, (*_DELTA, ((TIME, HEADS, KEY), "decay")), _OUT),
    "general delta": Case(
        _erase, (*_LINEAR, (_Q, "direction"), ((TIME, HEADS, KEY), "gate"), ((TIME, HEADS, KEY), "decay")), _OUT
    ),
    "scan": Case(ops.diagonal_scan, (((TIME, CHANNELS), "normal"), ((TIME, CHANNELS), "decay")), _X),
    "selective scan": Case(
        _selective,
        (
            (_X, "normal"),
            (_X, "positive"),
            ((CHANNELS, STATES), "decay"),
            ((TIME, 1, STATES), "normal"),
            ((TIME, 1, STATES), "normal"),
        ),
        _X,
    ),
    "conv": Case(ops.short_conv, ((_X, "normal"), ((CHANNELS, 4), "normal")), _X, by_heads=False),
    "shift": Case(ops.token_shift, ((_X, "normal"),), _X, by_heads=False),
}
