"""The selective scan: the recurrence of selective state space models, a vector of N states for each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..recurrence import Elementwise, Inputs, Summary
from . import chunked, reference

DECAYS = ("exponential", "longhorn")


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    *,
    decay: str = "exponential",
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A state space model whose step, input and output depend on the token.

        h_t = e^{delta_t a} h_{t-1} + delta_t x_t b_t        y_t = sum_n h_t c_t        decay = "exponential"
        h_t = (1 - delta_t b_t^2) h_{t-1} + delta_t x_t b_t  y_t = sum_n h_t c_t        decay = "longhorn"

    for every channel d and state n. x and delta `[B, T, D]`, delta never negative; a `[D, N]`, never positive, and
    None for "longhorn", where delta_t b_t^2 must not exceed 1; b and c `[B, T, N]`, shared by the channels. `documents`
    (default: each row one document) reset the state at their starts; padding gives 0. `initial_state` `[B, D, N]`
    enters only rows whose first token continues a document (`documents.continues`); without `documents` it enters
    every row. Returns y `[B, T, D]` in x's type and the state after each row's last token `[B, D, N]` in float32
    (float64 for float64), in which all is computed too. Every tensor gets its gradient. No tensor of size T D N is ever
    held. Raises ValueError for shapes or values that do not fit, or a backend that cannot run.

    "exponential" is Mamba's (Gu and Dao, 2023, arXiv 2312.00752), whose input is scaled by delta and not by the exact
    integral. "longhorn" is the diagonal form in which Longhorn was released (Liu et al., 2024, arXiv 2407.14207).
    """
    op = SelectiveRecurrence(decay)
    op.check((x, delta, a, b, c), initial_state)
    if documents is None:
        documents = Documents.whole(x.shape[0], x.shape[1], position=0 if initial_state is None else 1)
    documents.require(x.shape[0], x.shape[1])
    backend = resolve("selective_scan", backend, x.device, x.dtype)
    return _SelectiveScan.apply(x, delta, a, b, c, initial_state, op, documents, backend)  # type: ignore[return-value]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        a: Tensor | None,
        b: Tensor,
        c: Tensor,
        initial_state: Tensor | None,
        op: SelectiveRecurrence,
        documents: Documents,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, delta, a, b, c, initial_state)
        ctx.settings = op, documents, backend
        return op.forward((x, delta, a, b, c), initial_state, documents, backend=backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, initial_state = ctx.saved_tensors
        op, documents, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        gradients, dinitial = op.backward(dout, dfinal_state, tuple(inputs), initial_state, documents, backend=backend)
        return *gradients, None if initial_state is None else dinitial.to(initial_state.dtype), None, None, None


@dataclass(frozen=True)
class SelectiveRecurrence(Elementwise):
    """The parts of the op, as `kernels.recurrence.Recurrence` describes them; inputs are (x, delta, a, b, c).

    Of "exponential" only the sum of delta travels, `[B, D]` as transition of a summary: with it and a every rank has
    the decays; infinite where nothing of the state before survives. `received` makes them of it. `scale` is no
    setting of this op, and must be None.
    """

    decay: str = "exponential"

    def nothing(self, state: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(state)

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; got {self.decay!r}. Choose one")
        x, delta, a, b, c = inputs
        if x is None or delta is None or x.dim() != 3 or delta.shape != x.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (x, delta)]
            raise ValueError(f"x and delta must be [B, T, D]; got {shapes}. Put time in dimension 1")
        if x.shape[1] == 0:
            raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
        if b is None or c is None or b.dim() != 3 or b.shape != c.shape or b.shape[:2] != x.shape[:2]:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (b, c)]
            raise ValueError(f"b and c must be [B, T, N] for x {list(x.shape)}; got {shapes}. Share them by channels")
        if (a is None) != (self.decay == "longhorn"):
            given = "none" if a is None else list(a.shape)
            raise ValueError(f"a must be given for decay='exponential' and only there; got {given}. Change one of them")
        if a is not None and a.shape != (x.shape[2], b.shape[2]):
            raise ValueError(f"a must be [D, N] = {[x.shape[2], b.shape[2]]}; got {list(a.shape)}. Repeat it")
        state_shape = (x.shape[0], x.shape[2], b.shape[2])
        if initial_state is not None and initial_state.shape != state_shape:
            raise ValueError(
                f"initial_state must be [B, D, N] = {list(state_shape)}; got {list(initial_state.shape)}. "
                "Pass the final state of the tokens before"
            )
        if x.device.type == "cpu":
            self._check_values(delta.detach(), a, b.detach())

    def _check_values(self, delta: Tensor, a: Tensor | None, b: Tensor) -> None:
        if float(least := delta.min()) < 0:
            raise ValueError(f"delta must not be negative; got {float(least)}. Pass it through softplus, say")
        if a is not None:
            if float(greatest := a.detach().max()) > 0:
                raise ValueError(f"a must not be positive; got {float(greatest)}. Pass minus the rate of decay")
        elif float(greatest := (delta.amax(2).double() * b.abs().amax(2).double().square()).max()) > 1 + 1e-2:
            # What rounding to bfloat16 may add is let through.
            raise ValueError(f"delta b^2 must not exceed 1; got {float(greatest)}. Divide delta by 1 + delta |b|^2")

    def like(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors of the shapes and types of the output, the state and the transition for such inputs."""
        x, b = inputs[0], inputs[3]
        assert x is not None
        assert b is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        state = x.new_empty((x.shape[0], x.shape[2], b.shape[2]), dtype=dtype)
        transition = state.new_empty(state.shape[:2] if self.decay == "exponential" else state.shape)
        return torch.empty_like(x), state, transition

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
        """(y `[B, T, D]` in x's type, or with `exact` in what is computed in; final state `[B, D, N]`)."""
        problem = _problem(inputs, documents, scale)
        backend = resolve("selective_scan", backend, problem.x.device, problem.x.dtype)
        if backend == "reference":
            x, delta, a, b, c = problem.x, problem.delta, problem.a, problem.b, problem.c
            return reference.forward(x, delta, a, b, c, initial_state, documents, exact=exact)
        return _kernels(backend).forward(problem, initial_state, exact=exact)

    @torch.no_grad()
    def summarize(
        self, inputs: Inputs, final_state: Tensor | None, documents: Documents, *, backend: str = "auto"
    ) -> Summary:
        """transition = the sum of delta `[B, D]`, or Longhorn's decay over all tokens `[B, D, N]`."""
        problem = _problem(inputs, documents, None)
        assert final_state is not None  # of a run from nothing
        through = [c and len(row) == 1 for c, row in zip(documents.continues, documents.runs, strict=True)]
        keep = torch.tensor(through, device=problem.x.device)
        if self.decay == "exponential":
            total = problem.delta.sum(1, dtype=torch.float64).to(problem.dtype)
            return Summary(torch.where(keep[:, None], total, torch.inf), final_state)
        backend = resolve("selective_scan", backend, problem.x.device, problem.x.dtype)
        return Summary(torch.where(keep[:, None, None], _kernels(backend).total_decay(problem), 0.0), final_state)

    def received(self, summary: Summary, inputs: Inputs) -> Summary:
        """The summary with the decays that its sum of delta stands for, `[B, D, N]`."""
        a = inputs[2]
        if self.decay == "longhorn" or a is None:
            return summary
        total = summary.transition.unsqueeze(-1)
        decay = (total * a.to(total.dtype)).exp()
        return Summary(torch.where(total == torch.inf, 0.0, decay), summary.state)  # whatever a is, 0 included

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """`earlier` followed by `later`, both as received."""
        return Summary(later.transition * earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition ⊙ state + the summary's own."""
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
        """Adds Σ_n e^{g_1 + … + g_t} state c_t to `out` in place, in rows that continue a document, and returns it."""
        problem = _problem(inputs, documents, scale)
        backend = resolve("selective_scan", backend, problem.x.device, problem.x.dtype)
        return _kernels(backend).correct(problem, out, state)

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
        """((dx, ddelta, da, db, dc) in the inputs' types, gradient of the initial state)."""
        problem = _problem(inputs, documents, scale)
        backend = resolve("selective_scan", backend, problem.x.device, problem.x.dtype)
        if backend == "reference":
            state = problem.new_states() if initial_state is None else initial_state
            return reference.backward(dout, dfinal_state, inputs, state, documents)
        return _kernels(backend).backward(problem, dout, dfinal_state, initial_state)

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
        """Σ_t e^{g_1 + … + g_t} c_t dy_t `[B, D, N]` over the tokens that an entering state reaches."""
        problem = _problem(inputs, documents, scale)
        backend = resolve("selective_scan", backend, problem.x.device, problem.x.dtype)
        return _kernels(backend).summarize_backward(problem, dout)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transition ⊙ dstate + local."""
        return torch.addcmul(local, summary.transition, dstate)


def _kernels(backend: str) -> Any:
    """The module that runs a backend; the reference has no parts of its own but forward and backward."""
    if backend == "triton":
        from . import triton

        return triton
    return chunked


def _problem(inputs: Inputs, documents: Documents, scale: float | None) -> chunked.Problem:
    x, delta, a, b, c = inputs
    assert x is not None
    assert delta is not None
    assert b is not None
    assert c is not None
    assert scale is None
    return chunked.Problem(x, delta, a, b, c, documents)


def flops(tokens: int, *, channels: int, states: int) -> int:
    """Floating-point operations of a forward pass: 7 a token, channel and state, an exponential among them as 1."""
    return 7 * tokens * channels * states


def state_bytes(*, batch: int, channels: int, states: int, element_bytes: int = 4) -> int:
    """Bytes of the state that decoding keeps, whatever the length."""
    return batch * channels * states * element_bytes


def bytes_sent(
    *,
    batch: int,
    channels: int,
    states: int,
    ranks: int,
    spans: int = 1,
    decay: str = "exponential",
    element_bytes: int = 4,
) -> int:
    """Bytes that a rank sends forward and backward: state and transition of each span, then a gradient, to all others.

    The transition is the sum of delta, or Longhorn's decays. The length of the sequence does not matter.
    """
    transition = 1 if decay == "exponential" else states
    return (ranks - 1) * spans * batch * channels * (2 * states + transition) * element_bytes
