"""Gated linear attention: the recurrence of linear attention with no, constant, scalar or per-channel decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..recurrence import Inputs, Summary
from . import chunked, reference, slabs

CHUNK = slabs.CHUNK


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention over a decaying state of outer products.

        S_t = diag(e^{g_t}) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

    q, k `[B, T, H, K]`, or of G groups where G divides H (never expanded beyond a workspace); v `[B, T, H, V]`;
    `log_decay` g, never positive: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`. `scale=None` is K^(-1/2). `documents`
    (default: each row one document) reset the state at their starts; padding gives 0. `initial_state` `[B, H, K, V]`
    enters only rows whose first token continues a document (`documents.continues`); without `documents` it enters
    every row. Returns the output `[B, T, H, V]` in q's type and the state after each row's last token
    `[B, H, K, V]` in float32 (float64 for float64), in which all is computed too. Every tensor gets its gradient.
    Raises ValueError for shapes that do not fit, a positive decay, or a backend that cannot run.

    Katharopoulos et al., 2020, arXiv 2006.16236; with decay Yang et al., 2024, arXiv 2312.06635.
    """
    recurrence.check((q, k, v, log_decay), initial_state)
    if documents is None:
        documents = Documents.whole(q.shape[0], q.shape[1], position=0 if initial_state is None else 1)
    _check_documents(v, documents)
    backend = resolve("gated_linear_attention", backend, q.device)
    return _GatedLinearAttention.apply(q, k, v, log_decay, initial_state, documents, scale, backend)  # type: ignore[return-value]


class _GatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        documents: Documents,
        scale: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.settings = documents, scale, backend
        return recurrence.forward((q, k, v, log_decay), initial_state, documents, scale=scale, backend=backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, initial_state = ctx.saved_tensors
        documents, scale, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(inputs[2])
        dinputs, dinitial = recurrence.backward(
            dout, dfinal_state, tuple(inputs), initial_state, documents, scale=scale, backend=backend
        )
        return *dinputs, None if initial_state is None else dinitial.to(initial_state.dtype), None, None, None


class GatedLinearRecurrence:
    """The parts of the op, as `kernels.recurrence.Recurrence` describes them; inputs are (q, k, v, log_decay)."""

    diagonal = True

    def nothing(self, state: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(state)

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        q, k, v, log_decay = inputs
        if q is None or k is None or v is None or any(x.dim() != 4 for x in (q, k, v)):
            shapes = [None if x is None else list(x.shape) for x in (q, k, v)]
            raise ValueError(f"q, k and v must be [B, T, heads, dim]; got {shapes}. Put time in dimension 1")
        batch, length, heads, _ = v.shape
        if any(x.shape[:2] != v.shape[:2] or heads % x.shape[2] for x in (q, k)) or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"q and k must be [B, T, H or G, K] for v [B, T, H, V] with G dividing H; got {list(q.shape)}, "
                f"{list(k.shape)} and {list(v.shape)}. Check the heads of the mixer"
            )
        if length == 0:
            raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
        if log_decay is not None:
            shapes = ((heads,), (batch, length, heads), (batch, length, heads, k.shape[-1]))
            if log_decay.shape not in shapes:
                raise ValueError(
                    f"log_decay must be [H], [B, T, H] or [B, T, H, K] = {' or '.join(str(list(s)) for s in shapes)}; "
                    f"got {list(log_decay.shape)}. Project it to one of these"
                )
            if log_decay.device.type == "cpu" and float(greatest := log_decay.detach().max()) > 0:
                raise ValueError(
                    f"log_decay must not be positive; got {float(greatest)}. Pass the logarithm of the decay"
                )
        if initial_state is not None and initial_state.shape != (batch, heads, k.shape[-1], v.shape[-1]):
            raise ValueError(
                f"initial_state must be [B, H, K, V] = {[batch, heads, k.shape[-1], v.shape[-1]]}; "
                f"got {list(initial_state.shape)}. Pass the final state of the tokens before"
            )

    @torch.no_grad()
    def forward(
        self,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """(out `[B, T, H, V]` in q's type, final state `[B, H, K, V]`)."""
        problem = _problem(inputs, documents, scale)
        if resolve("gated_linear_attention", backend, problem.q.device) == "reference":
            q, k, v, log_decay = problem.q, problem.k, problem.v, problem.log_decay
            return reference.forward(q, k, v, log_decay, initial_state, documents, problem.scale)
        return chunked.forward(problem, initial_state)

    @torch.no_grad()
    def summarize(
        self, inputs: Inputs, final_state: Tensor | None, documents: Documents, *, backend: str = "auto"
    ) -> Summary:
        """transition = e^{sum of the row's log decays} as `[B, H, 1 or K, 1]`; 0 unless one document goes through."""
        problem = _problem(inputs, documents, None)
        log_decay, v = problem.log_decay, problem.v
        if log_decay is None:
            total = v.new_zeros(v.shape[0], v.shape[2], dtype=torch.float64)
        elif log_decay.dim() == 1:
            total = (log_decay.double() * v.shape[1]).expand(v.shape[0], -1)
        else:
            total = log_decay.sum(1, dtype=torch.float64)
        transition = total.exp().to(problem.dtype).reshape(v.shape[0], v.shape[2], -1, 1)
        through = [c and len(row) == 1 for c, row in zip(documents.continues, documents.runs, strict=True)]
        keep = torch.tensor(through, device=v.device)[:, None, None, None]
        assert final_state is not None  # of a run from nothing
        return Summary(torch.where(keep, transition, 0.0), final_state)

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
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Adds scale (q_t ⊙ e^{G_t}) state to `out` in place, in rows that continue a document, and returns it."""
        return chunked.correct(_problem(inputs, documents, scale), out, state)

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
        """((dq, dk, dv, dlog_decay) in the inputs' types, gradient of the initial state)."""
        problem = _problem(inputs, documents, scale)
        if resolve("gated_linear_attention", backend, problem.q.device) == "reference":
            state = problem.new_states() if initial_state is None else initial_state
            return reference.backward(dout, dfinal_state, inputs, state, documents, problem.scale)
        return chunked.backward(problem, dout, dfinal_state, initial_state)

    @torch.no_grad()
    def summarize_backward(
        self,
        dout: Tensor,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Σ_t scale (q_t ⊙ e^{G_t})ᵀ do_t `[B, H, K, V]` over the tokens that an entering state reaches."""
        return chunked.summarize_backward(_problem(inputs, documents, scale), dout)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transition ⊙ dstate + local."""
        return torch.addcmul(local, summary.transition, dstate)


recurrence = GatedLinearRecurrence()


def _problem(inputs: Inputs, documents: Documents, scale: float | None) -> chunked.Problem:
    q, k, v, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    _check_documents(v, documents)
    return chunked.Problem(q, k, v, log_decay, documents, k.shape[-1] ** -0.5 if scale is None else scale)


def _check_documents(v: Tensor, documents: Documents) -> None:
    if (documents.batch, documents.length) != tuple(v.shape[:2]):
        raise ValueError(
            f"documents must describe {v.shape[0]} rows of {v.shape[1]} tokens; got {documents.batch} rows of "
            f"{documents.length}. Build them for the tokens passed"
        )
    for row in documents.runs:
        for run in row[1:]:
            if run.position > 0:
                raise ValueError(
                    f"documents must start at position 0 inside a row; got position {run.position} at token "
                    f"{run.start}. Pass spans that are apart in the document as rows of their own"
                )


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks: 4 K V + 2 C (K + V) a token and head."""
    return tokens * heads * (4 * key_dim * value_dim + 2 * chunk * (key_dim + value_dim))


def state_bytes(*, batch: int, heads: int, key_dim: int, value_dim: int, element_bytes: int = 4) -> int:
    """Bytes of the state that decoding keeps, whatever the length."""
    return batch * heads * key_dim * value_dim * element_bytes


def bytes_sent(
    *,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    ranks: int,
    spans: int = 1,
    decay_dim: int = 1,
    element_bytes: int = 4,
) -> int:
    """Bytes that a rank sends forward and backward: states and transitions of its spans, then states, to all others.

    `decay_dim` is 1, or K for a decay per channel. The length of the sequence does not matter.
    """
    forward = key_dim * value_dim + decay_dim
    backward = key_dim * value_dim
    return (ranks - 1) * spans * batch * heads * (forward + backward) * element_bytes
