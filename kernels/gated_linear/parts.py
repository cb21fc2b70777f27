"""The parts of gated linear attention, as `kernels.recurrence.Recurrence` describes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..recurrence import Elementwise, Inputs, Summary
from . import chunked, reference, stable
from .checks import check_decays, check_documents, check_state, check_variant, check_variants, check_vectors
from .normalise import Normalise
from .variants import Call, Core


@dataclass(frozen=True)
class GatedLinearRecurrence(Elementwise):
    """Inputs are (q, k, v, log_decay, value_log_decay, bonus, log_input), of which the last ones may be left out.

    read, normaliser: as for `gated_linear_attention`. stabilised: whether there is a `log_input`.

    What `forward` returns as output is as it comes from the states, for `correct` to add to: with a normaliser
    `[B, T, H, V + 1]` in what is computed in, the last column what to divide by; stabilised `[B, T, H, V + 2]`, with
    the log scale that the others have been divided by. `finish` makes the op's output of it. States are
    `[B, H, K, V]`, with a normaliser `[B, H, K, V + 1]`, and stabilised with one row more, `[B, H, K + 1, V + 1]`, that
    holds their log scale: it is a unit, no variable, and carries no gradient; gradients of such states say in it which
    unit they are for.
    """

    read: str = "inclusive"
    normaliser: str | None = None
    stabilised: bool = False

    def nothing(self, state: Tensor) -> Tensor:
        """Zeros; a log scale as low as they come."""
        empty = torch.zeros_like(state)
        if self.stabilised:
            empty[:, :, -1] = stable.NOTHING
        return empty

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        q, k, v, log_decay, value_log_decay, bonus, log_input = _all(inputs)
        check_variant(self.read, self.normaliser)
        check_vectors(q, k, v)
        assert k is not None
        assert v is not None
        check_decays(k, v, log_decay, value_log_decay)
        check_variants(k, v, (log_decay, value_log_decay), bonus, log_input, self.read, self.normaliser)
        check_state(initial_state, self._state_shape(k, v), self._named_shape())

    def like(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors of the shapes and types of the raw output, the state and the transition."""
        q, k, v, log_decay, value_log_decay, *_ = _all(inputs)
        assert q is not None
        assert k is not None
        assert v is not None
        exact = torch.promote_types(q.dtype, torch.float32)
        extra = (self.normaliser is not None) + self.stabilised
        out = v.new_empty((*v.shape[:-1], v.shape[-1] + extra), dtype=exact if extra else q.dtype)
        keys = k.shape[-1] if log_decay is not None and log_decay.dim() in (2, 4) else 1
        values = 1 if value_log_decay is None else v.shape[-1]
        transition = v.new_empty((v.shape[0], v.shape[2], keys, values), dtype=exact)
        return out, v.new_empty(self._state_shape(k, v), dtype=exact), transition

    def _state_shape(self, k: Tensor, v: Tensor) -> tuple[int, ...]:
        return (
            *(v.shape[0], v.shape[2]),
            *(k.shape[-1] + self.stabilised, v.shape[-1] + (self.normaliser is not None)),
        )

    def _named_shape(self) -> str:
        return f"[B, H, K{' + 1' if self.stabilised else ''}, V{' + 1' if self.normaliser else ''}]"

    def finish(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The op's output, in `dtype`, of what `forward` and `correct` return; differentiable."""
        if self.normaliser is None:
            return raw
        return Normalise.apply(raw, self.normaliser, self.stabilised, dtype)  # type: ignore[return-value]

    def _call(
        self, inputs: Inputs, state: Tensor | None, documents: Documents, scale: float | None, backend: str
    ) -> Call:
        q, k, v, *_ = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        check_documents(v, documents)
        chosen = resolve("gated_linear_attention", backend, q.device, q.dtype)
        factor = k.shape[-1] ** -0.5 if scale is None else scale
        return Call(_core(chosen), _all(inputs), state, documents, factor, self.read, self.normaliser)

    def _reference(self, inputs: Inputs, backend: str) -> dict[str, Any] | None:
        """The settings of the reference, where it is asked for."""
        q = inputs[0]
        assert q is not None
        if resolve("gated_linear_attention", backend, q.device, q.dtype) != "reference":
            return None
        return {"read": self.read, "normaliser": self.normaliser}

    @torch.no_grad()
    def forward(
        self,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        *,
        scale: float | None = None,
        backend: str = "auto",
        exact: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(output as described above, or with `exact` always in what is computed in; final state)."""
        call = replace(self._call(inputs, initial_state, documents, scale, backend), exact=exact)
        settings = self._reference(inputs, backend)
        if settings is not None:
            return reference.forward(call.inputs, initial_state, documents, call.scale, exact=exact, **settings)
        return call.forward()

    @torch.no_grad()
    def summarize(
        self, inputs: Inputs, final_state: Tensor | None, documents: Documents, *, backend: str = "auto"
    ) -> Summary:
        """transition = e^{sum of the row's log decays}, `[B, H, 1 or K, 1 or V]`; 0 unless one document goes through.

        Stabilised, its logarithm `[B, H, 1, 1]`, −inf where the other is 0.
        """
        _, k, v, log_decay, value_log_decay, *_ = _all(inputs)
        assert k is not None
        assert v is not None
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        total = _total(log_decay, v).reshape(v.shape[0], v.shape[2], -1, 1)
        if value_log_decay is not None:
            total = total + _total(value_log_decay, v).reshape(v.shape[0], v.shape[2], 1, -1)
        through = [c and len(row) == 1 for c, row in zip(documents.continues, documents.runs, strict=True)]
        keep = torch.tensor(through, device=v.device)[:, None, None, None]
        assert final_state is not None  # of a run from nothing
        if self.stabilised:
            return Summary(torch.where(keep, total, -torch.inf).to(dtype), final_state)
        return Summary(torch.where(keep, total.exp().to(dtype), 0.0), final_state)

    def received(self, summary: Summary, inputs: Inputs) -> Summary:
        """The summary as it is."""
        return summary

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """`earlier` followed by `later`."""
        if self.stabilised:
            return Summary(later.transition + earlier.transition, self.advance(later, earlier.state))
        return Summary(later.transition * earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition ⊙ state + the summary's own."""
        if self.stabilised:
            return stable.advance(state, summary.transition, summary.state)
        return torch.addcmul(summary.state, summary.transition, state)

    @torch.no_grad()
    def correct(
        self,
        out: Tensor,
        inputs: Inputs,
        state: Tensor,
        documents: Documents,
        reads: Tensor | None = None,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Adds scale (q_t ⊙ e^{G_t}) state to `out` in place, in rows that continue a document, and returns it."""
        return self._call(inputs, state, documents, scale, backend).correct(out)

    @torch.no_grad()
    def backward(
        self,
        dout: Tensor,
        dfinal_state: Tensor | None,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> tuple[Inputs, Tensor]:
        """((dq, dk, dv, …) in the inputs' types, gradient of the initial state), given that of `forward`'s output."""
        call = self._call(inputs, initial_state, documents, scale, backend)
        settings = self._reference(inputs, backend)
        if settings is not None:
            _, k, v, *_ = inputs
            state = initial_state
            if state is None:
                assert k is not None
                assert v is not None
                state = self.nothing(v.new_zeros(self._state_shape(k, v), dtype=call.dtype))
            found, dinitial = reference.backward(
                dout, dfinal_state, call.inputs, state, documents, call.scale, **settings
            )
        else:
            found, dinitial = call.backward(dout, dfinal_state)
        return found[: len(inputs)], dinitial

    @torch.no_grad()
    def summarize_backward(
        self,
        dout: Tensor,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        reads: Tensor | None = None,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t, like a state, over the tokens that an entering state reaches."""
        return self._call(inputs, initial_state, documents, scale, backend).summarize_backward(dout)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transition ⊙ dstate + local."""
        if self.stabilised:
            return stable.retreat(dstate, summary.transition, local)
        return torch.addcmul(local, summary.transition, dstate)


def _all(inputs: Inputs) -> Inputs:
    return (*inputs, *(None,) * (7 - len(inputs)))


def _core(chosen: str) -> Core:
    """What runs the plain recurrence; that of the reference's parts is chunked."""
    if chosen == "triton":
        from . import triton as kernels

        return kernels
    return chunked


def _total(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """The sum over tokens, in float64: `[B, H, …]`."""
    if log_decay is None:
        return v.new_zeros(v.shape[0], v.shape[2], dtype=torch.float64)
    if log_decay.dim() < 3:
        return (log_decay.double() * v.shape[1]).expand(v.shape[0], *log_decay.shape)
    return log_decay.sum(1, dtype=torch.float64)
