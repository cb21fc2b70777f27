"""Variants of gated linear attention as its plain recurrence, with arithmetic before and after it.

* A normaliser's sum z_t q_t is the output for values of 1: one more column of v.
* An exclusive read of S_{t−1} by q_t is an inclusive one, at t − 1, by the queries of the token after; what a token
  sees of itself by the bonus is token-local. Queries and outputs are shifted by one; nothing is divided by a decay.
* An input gate e^{i_t} becomes a factor of the keys and another decay, see `stable.py`.

What runs the plain recurrence, chunked or by kernels, knows none of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..chunks.decay import factor
from ..documents import Documents
from . import stable
from .chunked import Problem
from .stable import LogScales

Inputs = tuple[Tensor | None, ...]


class Core(Protocol):
    """What runs the plain recurrence: `chunked` or `triton`."""

    def forward(
        self, problem: Problem, initial_state: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def correct(self, problem: Problem, out: Tensor, state: Tensor) -> Tensor: ...
    def summarize_backward(self, problem: Problem, dout: Tensor) -> Tensor: ...
    def backward(
        self, problem: Problem, dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Inputs, Tensor]: ...


@dataclass(frozen=True)
class Call:
    """One call of the op with variants, and the plain `problem` that is made of it."""

    core: Core
    inputs: Inputs
    initial_state: Tensor | None
    documents: Documents
    scale: float
    read: str
    normaliser: str | None
    exact: bool = False  # whether outputs stay in what is computed in

    # What was given.

    @cached_property
    def stabilised(self) -> bool:
        return self.inputs[6] is not None

    @property
    def exclusive(self) -> bool:
        return self.read == "exclusive"

    @property
    def q(self) -> Tensor:
        return _given(self.inputs[0])

    @property
    def k(self) -> Tensor:
        return _given(self.inputs[1])

    @property
    def v(self) -> Tensor:
        return _given(self.inputs[2])

    @property
    def bonus(self) -> Tensor | None:
        return self.inputs[5]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @cached_property
    def heads(self) -> int:
        return self.v.shape[2]

    # What is made of it.

    @cached_property
    def scales(self) -> LogScales:
        entering = None if self.initial_state is None else stable.unpack(self.initial_state)[1]
        return LogScales(self.inputs[3], _given(self.inputs[6]), entering, self.documents)

    @cached_property
    def units(self) -> Tensor:
        """The log scale of each token's output, in float64."""
        scales = self.scales
        if not self.exclusive:
            return scales.after
        return scales.before if self.bonus is None else torch.maximum(scales.before, scales.gates)

    @cached_property
    def state(self) -> Tensor | None:
        if self.initial_state is None or not self.stabilised:
            return self.initial_state
        return stable.unpack(self.initial_state)[0]

    @cached_property
    def key_factor(self) -> Tensor:
        """e^{i_t − m_t} `[B, T, H, 1]`."""
        return factor(self.scales.gates - self.scales.after, self.dtype).unsqueeze(-1)

    @cached_property
    def values(self) -> Tensor:
        return self.v if self.normaliser is None else F.pad(self.v, (0, 1), value=1.0)

    @cached_property
    def queries(self) -> Tensor:
        """Queries in the units of what they read."""
        if not (self.stabilised and self.exclusive):
            return self.q
        return self.of_heads(self.q) * factor(self.scales.before - self.units, self.dtype).unsqueeze(-1)

    @cached_property
    def goes_on(self) -> Tensor:
        return stable.going_on(self.documents, self.q.device)[..., None, None]

    @cached_property
    def problem(self) -> Problem:
        """The plain recurrence."""
        keys, log_decay, queries = self.k, self.inputs[3], self.queries
        if self.stabilised:
            keys = self.of_heads(keys) * self.key_factor  # in what is computed in, so that they are rounded once
            log_decay = self.scales.log_decay.to(self.dtype)
        if self.exclusive:
            # That of the token after, where it goes on with the document; the first has its state at hand.
            queries = F.pad(queries[:, 1:] * self.goes_on[:, 1:], (0, 0, 0, 0, 0, 1))
        return Problem(
            queries, keys, self.values, log_decay, self.documents, self.scale, self.inputs[4],
            wide=self.exact or self.exclusive or self.normaliser is not None,
        )  # fmt: skip

    def of_heads(self, x: Tensor) -> Tensor:
        """Groups repeated for their heads."""
        return x if x.shape[2] == self.heads else x.repeat_interleave(self.heads // x.shape[2], dim=2)

    # Forward.

    def forward(self) -> tuple[Tensor, Tensor]:
        problem = self.problem
        if not self.exclusive:
            out, final = self.core.forward(problem, self.state)
        else:
            batch, length, heads, dim = problem.v.shape
            shifted = problem.v.new_empty(batch, length + 1, heads, dim, dtype=self.dtype)
            _, final = self.core.forward(problem, self.state, shifted[:, 1:])
            shifted[:, 0] = 0.0 if self.state is None else self._first(problem.entering(self.state))
            out = self._add_own(shifted[:, :-1])
        if self.stabilised:
            out = torch.cat([out, self.units.to(out.dtype).unsqueeze(-1)], dim=-1)
            final = stable.pack(final, self._last_scale(), self.dtype)
        elif self.normaliser is None and not self.exact:
            out = out.to(self.q.dtype)
        return out, final

    def _last_scale(self) -> Tensor:
        return self.scales.after[:, -1]

    def _first(self, entering: Tensor) -> Tensor:
        """What each row's first token reads of the state that enters: `[B, H, V]`."""
        first = self.of_heads(self.queries[:, :1])[:, 0].to(self.dtype)
        return self.scale * torch.einsum("bhk,bhkv->bhv", first, entering)

    @cached_property
    def own_factor(self) -> Tensor:
        """What the bonus's term is multiplied by, `[B, T, H]`; 0 in padding."""
        if self.stabilised:
            return self.scale * factor(self.scales.gates - self.units, self.dtype) * self.scales.real
        real = self.documents.ids(self.q.device) >= 0
        return (self.scale * real.to(self.dtype))[..., None].expand(self.v.shape[:3])

    def _add_own(self, out: Tensor) -> Tensor:
        """Adds scale (q_t ⊙ u) · k_t v_t."""
        if self.bonus is not None:
            products = self.of_heads(self.q).to(self.dtype) * self.of_heads(self.k) * self.bonus
            out.addcmul_((products.sum(-1) * self.own_factor).unsqueeze(-1), self.values.to(self.dtype))
        return out

    def correct(self, out: Tensor) -> Tensor:
        """Adds what the initial state contributes to an output from nothing; in place."""
        state = _given(self.state)
        values = out
        if self.stabilised:
            values = out[..., :-1]
            from_nothing = Call(
                self.core, self.inputs, None, self.documents, self.scale, self.read, self.normaliser
            ).units  # fmt: skip
            values.mul_((from_nothing - self.units).exp_().to(out.dtype).unsqueeze(-1))
            out[..., -1] = self.units
        if not self.exclusive:
            self.core.correct(self.problem, values, state)
            return out
        length = self.v.shape[1]
        values[:, 0] += self._first(self.problem.entering(state))
        if length > 1:
            self.core.correct(self.problem.cut(length - 1), values[:, 1:], state)
        return out

    # Backward.

    def summarize_backward(self, dout: Tensor) -> Tensor:
        """The gradient of the initial state that comes from the outputs alone."""
        dout = dout[..., :-1] if self.stabilised else dout
        if self.exclusive:
            dstate = self.core.summarize_backward(self.problem, _earlier(dout))
            dstate += self._first_backward(dout)
        else:
            dstate = self.core.summarize_backward(self.problem, dout)
        return self._packed_gradient(dstate)

    def _packed_gradient(self, dstate: Tensor) -> Tensor:
        """With the scale that it has in common with the initial state."""
        if not self.stabilised:
            return dstate
        if self.initial_state is None:
            row = torch.full_like(dstate[:, :, :1], stable.NOTHING)
        else:
            row = self.initial_state[:, :, -1:].to(dstate.dtype)
        return torch.cat([dstate, row], dim=2)

    def _first_backward(self, dout: Tensor) -> Tensor:
        first = self.of_heads(self.queries[:, :1])[:, 0].to(self.dtype)
        return self.problem.entering(self.scale * torch.einsum("bhk,bhv->bhkv", first, dout[:, 0].to(self.dtype)))

    def backward(self, dout: Tensor, dfinal_state: Tensor | None) -> tuple[Inputs, Tensor]:
        """The gradients of all inputs and of the initial state; that of a packed state says its scale as it does."""
        if self.stabilised:
            dout = dout[..., :-1]
            if dfinal_state is not None:
                dfinal_state, scale = stable.unpack(dfinal_state)
                weight = (self._last_scale() - scale.double()).clamp(max=80.0).exp()  # a bare zero may have any scale
                dfinal_state = dfinal_state * weight.to(self.dtype)[..., None, None]
        given = _earlier(dout) if self.exclusive else dout
        (dq, dk, dv, ddecay, dvalue_decay), dstate = self.core.backward(self.problem, given, dfinal_state, self.state)
        dq, dk, dv = (_given(x) for x in (dq, dk, dv))
        dlog_input = dbonus = None
        if self.stabilised:
            dlog_input = torch.linalg.vecdot(dk.to(self.dtype), self.problem.k.to(self.dtype))
            dk = dk * self.key_factor
            ddecay = self._decay_gradient(_given(ddecay))
        if self.exclusive:
            dq = self._queries_backward(dq, dout)
            dstate = dstate + self._first_backward(dout)
        if self.bonus is not None:
            (own_q, own_k, own_v), dbonus, own_input = self._own_backward(dout)
            dq, dk = (self.of_groups(x, like) for x, like in ((dq, self.q), (dk, self.k)))
            dq, dk, dv = dq + self.of_groups(own_q, self.q), dk + self.of_groups(own_k, self.k), dv + own_v
            dlog_input = own_input if dlog_input is None else dlog_input + own_input
            dbonus = dbonus.to(self.bonus.dtype)
        found = (
            self.of_groups(dq, self.q), self.of_groups(dk, self.k), dv[..., : self.v.shape[-1]].to(self.v.dtype),
            ddecay, dvalue_decay, dbonus, dlog_input if self.inputs[6] is None else _as(dlog_input, self.inputs[6]),
        )  # fmt: skip
        kept = tuple(None if x is None else dx for x, dx in zip(self.inputs, found, strict=True))
        return kept, self._packed_gradient(dstate)

    def of_groups(self, dx: Tensor, x: Tensor) -> Tensor:
        """Gradients of heads summed over those that share a group."""
        if dx.shape[2] != x.shape[2]:
            dx = dx.unflatten(2, (x.shape[2], -1)).sum(3)
        return dx.to(x.dtype)

    def _decay_gradient(self, ddecay: Tensor) -> Tensor | None:
        """Of the decay that was given; a document's first token decays nothing."""
        log_decay = self.inputs[3]
        if log_decay is None:
            return None
        ddecay = ddecay.masked_fill(~self.scales.goes_on, 0.0)
        if log_decay.dim() == 1:
            ddecay = ddecay.sum((0, 1), dtype=torch.float64)
        return ddecay.to(log_decay.dtype)

    def _queries_backward(self, dshifted: Tensor, dout: Tensor) -> Tensor:
        """From the gradient of the shifted queries, and the first token's own reading."""
        dq = F.pad(dshifted[:, :-1], (0, 0, 0, 0, 1, 0))
        if self.state is not None:
            entering = self.problem.entering(self.state)
            first = self.scale * torch.einsum("bhv,bhkv->bhk", dout[:, 0].to(self.dtype), entering)
            dq[:, 0] = self.of_groups(first[:, None], dq)[:, 0]
        dq.mul_(self.goes_on)
        if self.stabilised:
            dq = dq * factor(self.scales.before - self.units, self.dtype).unsqueeze(-1)
        return dq

    def _own_backward(self, dout: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Through the bonus's term: gradients of q, k and v a head, of the bonus, and of log_input."""
        bonus = _given(self.bonus).to(self.dtype)
        q, k = (self.of_heads(x).to(self.dtype) for x in (self.q, self.k))
        values, dout = self.values.to(self.dtype), dout.to(self.dtype)
        dproduct = (torch.linalg.vecdot(dout, values) * self.own_factor).unsqueeze(-1)
        product = (q * k * bonus).sum(-1)
        dbonus = (dproduct * q * k).sum((0, 1))
        dlog_input = dproduct.squeeze(-1) * product
        dv = dout * (product * self.own_factor).unsqueeze(-1)
        return (dproduct * k * bonus, dproduct * q * bonus, dv), dbonus, dlog_input


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _as(x: Tensor | None, like: Tensor) -> Tensor:
    return _given(x).to(like.dtype)


def _earlier(dout: Tensor) -> Tensor:
    """The gradients of the outputs of the token after."""
    return F.pad(dout[:, 1:], (0, 0, 0, 0, 0, 1))
