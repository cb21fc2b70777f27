"""The diagonal scan: the recurrence of gated linear units of state, h_t = e^{a_t} h_{t-1} + x_t."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..recurrence import Elementwise, Inputs, Summary
from . import chunked, reference


def diagonal_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A decaying sum over time, channel by channel.

        h_t = e^{a_t} h_{t-1} + x_t        out_t = h_t

    x `[B, T, …]`, with any dims of channels; `log_decay` a, never positive: like x, or constant, with x's channels
    alone. `documents` (default: each row one document) reset the state at their starts; padding gives 0.
    `initial_state` `[B, …]` enters only rows whose first token continues a document (`documents.continues`); without
    `documents` it enters every row. Returns every h in x's type and the state after each row's last token `[B, …]` in
    float32 (float64 for float64), in which all is computed too. Every tensor gets its gradient. Raises ValueError for
    shapes that do not fit, a positive decay, or a backend that cannot run.

    As in HGRN (Qin et al., 2023, arXiv 2311.04823), whose x is (1 - e^a) times its input; the scan itself after
    Martin and Cundy, 2018, arXiv 1709.04057.
    """
    recurrence.check((x, log_decay), initial_state)
    if documents is None:
        documents = Documents.whole(x.shape[0], x.shape[1], position=0 if initial_state is None else 1)
    documents.require(x.shape[0], x.shape[1])
    backend = resolve("diagonal_scan", backend, x.device, x.dtype)
    return _DiagonalScan.apply(x, log_decay, initial_state, documents, backend)  # type: ignore[return-value]


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, documents: Documents, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, log_decay, initial_state)
        ctx.settings = documents, backend
        return recurrence.forward((x, log_decay), initial_state, documents, backend=backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, log_decay, initial_state = ctx.saved_tensors
        documents, backend = ctx.settings
        (dx, dlog_decay), dinitial = recurrence.backward(
            torch.zeros_like(x) if dout is None else dout,
            dfinal_state,
            (x, log_decay),
            initial_state,
            documents,
            backend=backend,
        )
        return dx, dlog_decay, None if initial_state is None else dinitial.to(initial_state.dtype), None, None


class DiagonalRecurrence(Elementwise):
    """The parts of the op, as `kernels.recurrence.Recurrence` describes them; inputs are (x, log_decay).

    `scale` is no setting of this op, and must be None.
    """

    def nothing(self, state: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(state)

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        x, log_decay = inputs
        if x is None or log_decay is None or x.dim() < 3:
            raise ValueError(
                f"x must be [B, T, …] with a dim of channels, and log_decay be given; got "
                f"{[None if given is None else list(given.shape) for given in inputs]}. Put time in dimension 1"
            )
        if x.shape[1] == 0:
            raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
        # Constants of more dims could not be told from sequences.
        if log_decay.shape != x.shape and (log_decay.shape != x.shape[2:] or log_decay.dim() > 2):
            raise ValueError(
                f"log_decay must be like x, {list(x.shape)}, or constant, {list(x.shape[2:])} of at most two dims; "
                f"got {list(log_decay.shape)}. Expand it to one of these"
            )
        if log_decay.device.type == "cpu" and float(greatest := log_decay.detach().max()) > 0:
            raise ValueError(f"log_decay must not be positive; got {float(greatest)}. Pass the logarithm of the decay")
        if initial_state is not None and initial_state.shape != x[:, 0].shape:
            raise ValueError(
                f"initial_state must be [B, …] = {list(x[:, 0].shape)}; got {list(initial_state.shape)}. "
                "Pass the final state of the tokens before"
            )

    def like(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors of the shapes and types of the output, the state and the transition for such inputs."""
        x = inputs[0]
        assert x is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        state, transition = (x.new_empty(x.shape[:1] + x.shape[2:], dtype=dtype) for _ in range(2))
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
        """(every h in x's type, or with `exact` in what is computed in; state after each row's last token)."""
        problem, given = _problem(inputs, documents, scale), inputs[0]
        assert given is not None
        backend = resolve("diagonal_scan", backend, given.device, given.dtype)
        entering = None if initial_state is None else initial_state.flatten(1)
        if backend == "reference":
            out, final = reference.forward(problem.x, problem.log_decay, entering, documents, exact=exact)
        else:
            out, final = _kernels(backend).forward(problem, entering, exact=exact)
        return out.view(given.shape), final.view_as(given[:, 0])

    @torch.no_grad()
    def summarize(
        self, inputs: Inputs, final_state: Tensor | None, documents: Documents, *, backend: str = "auto"
    ) -> Summary:
        """transition = e^{sum of the row's log decays}, like the state; 0 unless one document goes through."""
        x, log_decay = inputs
        assert x is not None
        assert log_decay is not None
        assert final_state is not None  # of a run from nothing
        if log_decay.shape == x.shape:
            total = log_decay.sum(1, dtype=torch.float64)
        else:
            total = (log_decay.double() * x.shape[1]).expand_as(final_state)
        through = [c and len(row) == 1 for c, row in zip(documents.continues, documents.runs, strict=True)]
        keep = torch.tensor(through, device=x.device).view(-1, *[1] * (x.dim() - 2))
        return Summary(torch.where(keep, total.exp().to(final_state.dtype), 0.0), final_state)

    def received(self, summary: Summary, inputs: Inputs) -> Summary:
        """The summary as it is."""
        return summary

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """`earlier` followed by `later`."""
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
        """Adds e^{a_1 + … + a_t} state to `out` in place, in rows that continue a document, and returns it."""
        problem = _problem(inputs, documents, scale)
        flat = out.view(*out.shape[:2], -1)
        _kernels(resolve("diagonal_scan", backend, out.device, problem.x.dtype)).correct(
            problem, flat, state.flatten(1)
        )
        return out

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
        """((dx, dlog_decay) in the inputs' types, gradient of the initial state)."""
        problem = _problem(inputs, documents, scale)
        x, log_decay = inputs
        assert x is not None
        assert log_decay is not None
        dout = dout.flatten(2)
        entering, dfinal = (None if s is None else s.flatten(1) for s in (initial_state, dfinal_state))
        backend = resolve("diagonal_scan", backend, x.device, x.dtype)
        if backend == "reference":
            found = reference.backward(dout, dfinal, problem.x, problem.log_decay, entering, documents)
        else:
            found = _kernels(backend).backward(problem, dout, dfinal, entering)
        dx, dlog_decay, dinitial = found
        return (dx.view(x.shape), dlog_decay.view(log_decay.shape)), dinitial.view_as(x[:, 0])

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
        """Σ_t e^{a_1 + … + a_t} dout_t over the tokens that an entering state reaches."""
        problem = _problem(inputs, documents, scale)
        kernels = _kernels(resolve("diagonal_scan", backend, dout.device, problem.x.dtype))
        return kernels.summarize_backward(problem, dout.flatten(2)).view_as(dout[:, 0])

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transition ⊙ dstate + local."""
        return torch.addcmul(local, summary.transition, dstate)


recurrence = DiagonalRecurrence()


def _kernels(backend: str) -> Any:
    """The module that runs a backend; the reference has no parts of its own but forward and backward."""
    if backend == "triton":
        from . import triton

        return triton
    return chunked


def _problem(inputs: Inputs, documents: Documents, scale: float | None) -> chunked.Problem:
    """The problem with all dims of channels as one."""
    x, log_decay = inputs
    assert x is not None
    assert log_decay is not None
    assert scale is None
    constant = log_decay.shape != x.shape
    return chunked.Problem(x.flatten(2), log_decay.flatten(0 if constant else 2), documents)


def flops(tokens: int, *, channels: int) -> int:
    """Floating-point operations of a forward pass: a product, a sum and an exponential a token and channel."""
    return 3 * tokens * channels


def state_bytes(*, batch: int, channels: int, element_bytes: int = 4) -> int:
    """Bytes of the state that decoding keeps, whatever the length."""
    return batch * channels * element_bytes


def bytes_sent(*, batch: int, channels: int, ranks: int, spans: int = 1, element_bytes: int = 4) -> int:
    """Bytes that a rank sends forward and backward: state and transition of each span, then a gradient, to all others.

    The length of the sequence does not matter.
    """
    return 3 * (ranks - 1) * spans * batch * channels * element_bytes
