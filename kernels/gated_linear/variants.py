"""Variants of gated linear attention as its plain recurrence, with arithmetic before and after it.

* A normaliser's sum z_t q_t is the output for values of 1: one more column of v.
* An exclusive read of S_{t−1} by q_t is an inclusive one, at t − 1, by the queries of the token after; what a token
  sees of itself by the bonus is token-local. Queries and outputs are shifted by one; nothing is divided by a decay.
* An input gate e^{i_t} becomes a factor of the keys and another decay, see `stable.py`.

What runs the plain recurrence, chunked or by kernels, knows none of this.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..chunks.decay import factor
from ..documents import Documents
from ..operation import Tensors
from ..problem import Problem
from . import stable
from .parts import GatedLinearInputs, GatedLinearRecurrence
from .stable import LogScales


def forward(problem: Problem[GatedLinearInputs], initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output as `GatedLinearRecurrence` says, final state)."""
    return _variant(problem, initial_state).forward()


def correct(problem: Problem[GatedLinearInputs], out: Tensor, state: Tensor) -> Tensor:
    """Adds what the state contributes to an output from the zero state; in place."""
    return _variant(problem, state).correct(out)


def summarize_backward(problem: Problem[GatedLinearInputs], dout: Tensor, initial_state: Tensor | None) -> Tensor:
    """The gradient of the initial state that comes from the outputs alone."""
    return _variant(problem, initial_state).summarize_backward(dout)


def backward(
    problem: Problem[GatedLinearInputs], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensors, Tensor]:
    """The gradients of all inputs and of the initial state; that of a packed state says its scale as it does."""
    return _variant(problem, initial_state).backward(dout, dfinal_state)


class _Variant:
    """A call with variants, given the state that enters, and the plain problem that is made of it.

    alone: the same call without a state that enters, or None for that one itself.
    """

    def __init__(
        self, problem: Problem[GatedLinearInputs], initial_state: Tensor | None, alone: _Variant | None = None
    ) -> None:
        self.whole, self.op, self.initial_state, self.alone = problem, problem.op, initial_state, alone
        self.inputs, self.documents = problem.inputs, problem.documents
        self.q, self.k, self.v, self.bonus = self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.bonus
        self.dtype, self.scale, self.heads = problem.dtype, problem.scale, self.v.shape[2]
        self.exclusive = self.op.read == "exclusive"

    # What is made of the call.

    @cached_property
    def scales(self) -> LogScales | None:
        """The log scales of a stabilised call."""
        if self.inputs.log_input is None:
            return None
        entering = None if self.initial_state is None else stable.unpack(self.initial_state)[1]
        return LogScales(self.inputs.log_decay, self.inputs.log_input, entering, self.documents)

    def units(self, scales: LogScales) -> Tensor:
        """The log scale of each token's output, in float64."""
        if not self.exclusive:
            return scales.after
        return scales.before if self.bonus is None else torch.maximum(scales.before, scales.gates)

    @cached_property
    def state(self) -> Tensor | None:
        """The initial state without its log scale."""
        if self.initial_state is None or self.scales is None:
            return self.initial_state
        return stable.unpack(self.initial_state)[0]

    @cached_property
    def values(self) -> Tensor:
        return F.pad(self.v, (0, 1), value=1.0) if self.op.raw else self.v

    @cached_property
    def query_factor(self) -> Tensor | None:
        """What brings queries to the units of what they read, `[B, T, H, 1]`."""
        if self.scales is None or not self.exclusive:
            return None
        return factor(self.scales.before - self.units(self.scales), self.dtype).unsqueeze(-1)

    @cached_property
    def queries(self) -> Tensor:
        return self.q if self.query_factor is None else self.of_heads(self.q) * self.query_factor

    @cached_property
    def key_factor(self) -> Tensor | None:
        """e^{i_t − m_t} `[B, T, H, 1]`."""
        return None if self.scales is None else factor(self.scales.gates - self.scales.after, self.dtype).unsqueeze(-1)

    @cached_property
    def goes_on(self) -> Tensor:
        return self.documents.on(self.q.device, stable.going_on)[..., None, None]

    @cached_property
    def plain(self) -> Problem[GatedLinearInputs]:
        """The plain recurrence; where there are no log scales, the same one for every state that enters."""
        if self.scales is None and self.alone is not None:
            return self.alone.plain
        keys, log_decay, queries = self.k, self.inputs.log_decay, self.queries
        if self.scales is not None and self.key_factor is not None:
            keys = self.of_heads(keys) * self.key_factor  # in what is computed in, so that they are rounded once
            log_decay = self.scales.log_decay.to(self.dtype)
        if self.exclusive:
            # That of the token after, where it goes on with the document; the first has its state at hand.
            queries = F.pad(queries[:, 1:] * self.goes_on[:, 1:], (0, 0, 0, 0, 0, 1))
        inputs = GatedLinearInputs(queries, keys, self.values, log_decay, self.inputs.value_log_decay)
        return Problem(
            GatedLinearRecurrence(scale=self.scale), inputs, self.documents, self.whole.backend, exact=True,
            unrounded=self.bonus is not None,  # its gradients are added to these
        )  # fmt: skip

    def of_heads(self, x: Tensor) -> Tensor:
        """Groups repeated for their heads."""
        return x if x.shape[2] == self.heads else x.repeat_interleave(self.heads // x.shape[2], dim=2)

    def of_groups(self, dx: Tensor, x: Tensor) -> Tensor:
        """Gradients of heads summed over those that share a group."""
        return sum_of_heads(dx, x.shape[2]).to(x.dtype)

    # Forward.

    def forward(self) -> tuple[Tensor, Tensor]:
        plain, run = self.plain, self.plain.implementation.forward
        if not self.exclusive:
            out, final = run(plain, self.state)
        else:
            batch, length, heads, dim = self.values.shape
            shifted = self.values.new_empty(batch, length + 1, heads, dim, dtype=self.dtype)
            _, final = run(plain, self.state, shifted[:, 1:])
            shifted[:, 0] = 0.0 if self.state is None else self._first(plain.entering(self.state))
            out = self._add_own(shifted[:, :-1])
        if self.scales is not None:
            out = torch.cat([out, self.units(self.scales).to(out.dtype).unsqueeze(-1)], dim=-1)
            final = stable.pack(final, self.scales.after[:, -1], self.dtype)
        elif not self.whole.exact:
            out = out.to(self.q.dtype)
        return out, final

    def _first(self, entering: Tensor) -> Tensor:
        """What each row's first token reads of the state that enters: `[B, H, V]`."""
        return self.scale * torch.einsum("bhk,bhkv->bhv", self._first_query, entering)

    @cached_property
    def _first_query(self) -> Tensor:
        return self.of_heads(self.queries[:, :1])[:, 0].to(self.dtype)

    @cached_property
    def own_factor(self) -> Tensor:
        """What the bonus's term is multiplied by, `[B, T, H]`; 0 in padding."""
        if self.scales is not None:
            own = factor(self.scales.gates - self.units(self.scales), self.dtype)
            return self.scale * own * self.scales.real
        real = self.documents.ids(self.q.device) >= 0
        return (self.scale * real.to(self.dtype))[..., None].expand(self.v.shape[:3])

    def _add_own(self, out: Tensor) -> Tensor:
        """Adds scale (q_t ⊙ u) · k_t v_t."""
        if self.bonus is not None:
            products = self.of_heads(self.q).to(self.dtype) * self.of_heads(self.k) * self.bonus
            out.addcmul_((products.sum(-1) * self.own_factor).unsqueeze(-1), self.values.to(self.dtype))
        return out

    def correct(self, out: Tensor) -> Tensor:
        plain, state, values = self.plain, self.state, out
        assert state is not None
        if self.scales is not None:
            values, units = out[..., :-1], self.units(self.scales)
            alone = self.alone
            assert alone is not None
            assert alone.scales is not None
            values.mul_((alone.units(alone.scales) - units).exp_().to(out.dtype).unsqueeze(-1))
            out[..., -1] = units
        if not self.exclusive:
            plain.implementation.correct(plain, values, state)
            return out
        values[:, 0] += self._first(plain.entering(state))
        length = self.v.shape[1] - 1
        if length:
            shorter = self.documents.derive(Documents.slice, 0, length)
            cut = {name: x[:, :length] for name, x in plain.inputs._asdict().items() if x is not None and x.dim() > 2}
            earlier = replace(plain, inputs=plain.inputs._replace(**cut), documents=shorter)
            plain.implementation.correct(earlier, values[:, 1:], state)
        return out

    # Backward.

    def summarize_backward(self, dout: Tensor) -> Tensor:
        plain = self.plain
        dout = dout if self.scales is None else dout[..., :-1]
        if not self.exclusive:
            return self._with_scale(plain.implementation.summarize_backward(plain, dout))
        dstate = plain.implementation.summarize_backward(plain, _earlier(dout))
        return self._with_scale(dstate + self._first_backward(dout))

    def _with_scale(self, dstate: Tensor) -> Tensor:
        """The gradient of the state with the scale that it has in common with the initial state."""
        if self.scales is None:
            return dstate
        if self.initial_state is None:
            row = torch.full_like(dstate[:, :, :1], stable.LOWEST)
        else:
            row = self.initial_state[:, :, -1:].to(dstate.dtype)
        return torch.cat([dstate, row], dim=2)

    def _first_backward(self, dout: Tensor) -> Tensor:
        dfirst = torch.einsum("bhk,bhv->bhkv", self._first_query, dout[:, 0].to(self.dtype))
        return self.plain.entering(self.scale * dfirst)

    def backward(self, dout: Tensor, dfinal_state: Tensor | None) -> tuple[Tensors, Tensor]:
        plain, inputs = self.plain, self.inputs
        if self.scales is not None:
            dout = dout[..., :-1]
            if dfinal_state is not None:
                dfinal_state, scale = stable.unpack(dfinal_state)
                # A bare zero may have any scale.
                weight = (self.scales.after[:, -1] - scale.double()).clamp(max=80.0).exp()
                dfinal_state = dfinal_state * weight.to(self.dtype)[..., None, None]
        shifted = _earlier(dout) if self.exclusive else dout
        gradients, dstate = plain.implementation.backward(plain, shifted, dfinal_state, self.state)
        dq, dk, dv, ddecay, dvalue_decay, *_ = gradients
        dlog_input = dbonus = None
        if self.scales is not None:
            dlog_input = torch.linalg.vecdot(dk.to(self.dtype), plain.inputs.k.to(self.dtype))
            dk = dk * self.key_factor
            ddecay = self._decay_gradient(ddecay, self.scales)
        if self.exclusive:
            dq = self._queries_backward(dq, dout)
            dstate = dstate + self._first_backward(dout)
        if self.bonus is not None:
            own_q, own_k, own_v, dbonus, own_input = self._own_backward(dout, self.bonus.to(self.dtype))
            dq = self._with_own(dq, own_q, self.q)
            dk = self._with_own(dk, own_k, self.k)
            dv = dv + own_v
            dlog_input = None if dlog_input is None else dlog_input + own_input
            dbonus = dbonus.to(self.bonus.dtype)
        if dlog_input is not None and inputs.log_input is not None:
            dlog_input = dlog_input.to(inputs.log_input.dtype)
        dq, dk, dv = (
            self.of_groups(dq, self.q),
            self.of_groups(dk, self.k),
            dv[..., : self.v.shape[-1]].to(self.v.dtype),
        )
        return GatedLinearInputs(dq, dk, dv, ddecay, dvalue_decay, dbonus, dlog_input), self._with_scale(dstate)

    def _with_own(self, dx: Tensor, own: Tensor, x: Tensor) -> Tensor:
        """The sum of gradients per head or per group, and per head, rounded once."""
        groups = x.shape[2]
        return sum_of_heads(dx.to(own.dtype), groups).add_(sum_of_heads(own, groups)).to(x.dtype)

    def _decay_gradient(self, ddecay: Tensor, scales: LogScales) -> Tensor | None:
        """Of the decay that came with the call; a document's first token decays nothing."""
        log_decay = self.inputs.log_decay
        if log_decay is None:
            return None
        ddecay = ddecay.masked_fill(~scales.goes_on, 0.0)
        if log_decay.dim() == 1:
            ddecay = ddecay.sum((0, 1), dtype=torch.float64)
        return ddecay.to(log_decay.dtype)

    def _queries_backward(self, dshifted: Tensor, dout: Tensor) -> Tensor:
        """From the gradient of the shifted queries, and the first token's own reading."""
        dq = F.pad(dshifted[:, :-1], (0, 0, 0, 0, 1, 0))
        if self.state is not None:
            entering = self.plain.entering(self.state)
            first = self.scale * torch.einsum("bhv,bhkv->bhk", dout[:, 0].to(self.dtype), entering)
            dq[:, 0] = self.of_groups(first[:, None], dq)[:, 0]
        dq.mul_(self.goes_on)
        return dq if self.query_factor is None else dq * self.query_factor

    def _own_backward(self, dout: Tensor, bonus: Tensor) -> tuple[Tensor, ...]:
        """Through the bonus's term: gradients of q, k and v per head, of the bonus, and of log_input."""
        q, k = (self.of_heads(x).to(self.dtype) for x in (self.q, self.k))
        values, dout = self.values.to(self.dtype), dout.to(self.dtype)
        dproduct = (torch.linalg.vecdot(dout, values) * self.own_factor).unsqueeze(-1)
        product = (q * k * bonus).sum(-1)
        dv = dout * (product * self.own_factor).unsqueeze(-1)
        return (
            dproduct * k * bonus,
            dproduct * q * bonus,
            dv,
            (dproduct * q * k).sum((0, 1)),
            dproduct[..., 0] * product,
        )


def sum_of_heads(dx: Tensor, groups: int) -> Tensor:
    """Gradients of heads summed over those that share a group; those of groups as they are."""
    return dx if dx.shape[2] == groups else dx.unflatten(2, (groups, -1)).sum(3)


class _Variants:
    """The variants that the parts of a run share: without an entering state, and with the last one that there was."""

    def __init__(self, problem: Problem[GatedLinearInputs]) -> None:
        self.problem, self.alone = problem, _Variant(problem, None)
        self.entered = self.alone

    def of(self, state: Tensor | None) -> _Variant:
        if state is None:
            return self.alone
        if self.entered.initial_state is not state:
            self.entered = _Variant(self.problem, state, self.alone)
        return self.entered


def _variant(problem: Problem[GatedLinearInputs], state: Tensor | None) -> _Variant:
    return problem.once(_Variants).of(state)


def _earlier(dout: Tensor) -> Tensor:
    """The gradients of the outputs of the token after."""
    return F.pad(dout[:, 1:], (0, 0, 0, 0, 0, 1))
