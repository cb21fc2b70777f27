"""The delta rule: a linear recurrence that erases what it holds under a key before it writes there."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..documents import Documents
from ..recurrence import Beginning, Inputs, Summary
from . import chunked, reference
from .sweep import CHUNK, Problem

PIECE = 1024  # tokens of one product with what reads an entering state, on a CPU


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    erase: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decays a state of outer products, moves what it holds under the key k_t towards v_t, and reads it.

        S_t = (I - beta_t k_t^T k_t) diag(e^{g_t}) S_{t-1} + beta_t k_t^T v_t        o_t = scale q_t S_t

    q, k `[B, T, H, K]`, or of G groups where G divides H (never expanded beyond a workspace); v `[B, T, H, V]`; `beta`
    `[B, T, H]` (None is 1), in [0, 2] for keys of length 1: with longer keys the state may grow without bound.
    `log_decay` g, never positive: None, `[B, T, H]` (gated DeltaNet) or `[B, T, H, K]` (Kimi Delta Attention).

    `erase` = (a, b), each shaped like k, in place of beta makes the general diagonal-plus-low-rank step of RWKV-7

        S_t = (diag(e^{g_t}) + b_t^T a_t) S_{t-1} + k_t^T v_t        a_t meets the state before its decay

    of which the first is the case a_t = -beta_t e^{g_t} ⊙ k_t, b_t = k_t, with beta_t v_t written.

    `scale=None` is K^(-1/2). `documents` (default: each row one document) reset the state at their starts; padding
    gives 0. `initial_state` `[B, H, K, V]` enters only rows whose first token continues a document
    (`documents.continues`); without `documents` it enters every row. Returns the output `[B, T, H, V]` in q's type and
    the state after each row's last token `[B, H, K, V]` in float32 (float64 for float64), in which all is computed
    too. Every tensor gets its gradient. Raises ValueError for shapes that do not fit, a positive decay, beta and
    erase together, or a backend that cannot run.

    Schlag et al., 2021, arXiv 2102.11174; in chunks Yang et al., 2024, arXiv 2406.06484; with decay arXiv 2412.06464,
    per channel arXiv 2510.26692; RWKV-7: Peng et al., 2025, arXiv 2503.14456.
    """
    a, b = (None, None) if erase is None else erase
    recurrence.check((q, k, v, beta, log_decay, a, b), initial_state)
    if documents is None:
        documents = Documents.whole(q.shape[0], q.shape[1], position=0 if initial_state is None else 1)
    documents.require(q.shape[0], q.shape[1])
    backend = resolve("delta_rule", backend, q.device, q.dtype)
    return _DeltaRule.apply(q, k, v, beta, log_decay, a, b, initial_state, documents, scale, backend)  # type: ignore[return-value]


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        initial_state: Tensor | None,
        documents: Documents,
        scale: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, log_decay, a, b, initial_state)
        ctx.settings = documents, scale, backend
        inputs = q, k, v, beta, log_decay, a, b
        return recurrence.forward(inputs, initial_state, documents, scale=scale, backend=backend)

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


class DeltaRecurrence:
    """The parts of the op, as `kernels.recurrence.Recurrence` describes them.

    Inputs are (q, k, v, beta, log_decay, a, b), with None for what is not given. Transitions are matrices
    `[B, H, K, K]`, and what tokens read of an entering state takes the whole run: it is kept.
    """

    def like(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors of the shapes and types of the output, the state and the transition."""
        q, k, v = inputs[:3]
        assert q is not None
        assert k is not None
        assert v is not None
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = v.new_empty(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1], dtype=wide)
        transition = state.new_empty(*state.shape[:3], k.shape[-1])
        return torch.empty(v.shape, dtype=q.dtype, device=q.device), state, transition

    def reads_like(self, inputs: Inputs) -> Tensor:
        """Of the queries' type."""
        q, k, v = inputs[:3]
        assert q is not None
        assert k is not None
        assert v is not None
        return q.new_empty(*v.shape[:3], k.shape[-1])

    def nothing(self, state: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(state)

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        q, k, v, beta, log_decay, a, b = inputs
        if q is None or k is None or v is None or any(x.dim() != 4 for x in (q, k, v)):
            shapes = [None if x is None else list(x.shape) for x in (q, k, v)]
            raise ValueError(f"q, k and v must be [B, T, heads, dim]; got {shapes}. Put time in dimension 1")
        batch, length, heads, values = v.shape
        keys = k.shape[-1]
        if length == 0:
            raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
        if (a is None) != (b is None) or (a is not None and beta is not None):
            raise ValueError(
                "erase must be a pair of tensors, in place of beta; got both, or one of the pair. Multiply beta into it"
            )
        for name, x in (("q", q), ("k", k), ("a of erase", a), ("b of erase", b)):
            if x is None:
                continue
            if x.dim() != 4 or x.shape[:2] != v.shape[:2] or heads % x.shape[2] or x.shape[-1] != keys:
                raise ValueError(
                    f"{name} must be [B, T, H or G, K] for v [B, T, H, V] = {list(v.shape)} with G dividing H, and K "
                    f"that of k, {keys}; got {list(x.shape)}. Check the heads of the mixer"
                )
        if beta is not None and beta.shape != v.shape[:3]:
            raise ValueError(f"beta must be [B, T, H] = {list(v.shape[:3])}; got {list(beta.shape)}. Give one a head")
        if log_decay is not None:
            shapes = ((batch, length, heads), (batch, length, heads, keys))
            if log_decay.shape not in shapes:
                raise ValueError(
                    f"log_decay must be [B, T, H] or [B, T, H, K] = {' or '.join(str(list(s)) for s in shapes)}; "
                    f"got {list(log_decay.shape)}. Project it to one of these"
                )
            if log_decay.device.type == "cpu" and float(greatest := log_decay.detach().max()) > 0:
                raise ValueError(
                    f"log_decay must not be positive; got {float(greatest)}. Pass the logarithm of the decay"
                )
        if initial_state is not None and initial_state.shape != (batch, heads, keys, values):
            raise ValueError(
                f"initial_state must be [B, H, K, V] = {[batch, heads, keys, values]}; "
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
        problem, backend = _problem(inputs, documents, scale, backend)
        if backend == "reference":
            return reference.forward(inputs, initial_state, documents, problem.scale)
        return _core(backend).forward(problem, initial_state)

    @torch.no_grad()
    def begin(
        self, inputs: Inputs, documents: Documents, *, scale: float | None = None, backend: str = "auto"
    ) -> Beginning:
        """A run from nothing, its outputs in what is computed in, beside one of the identity.

        The transition is what becomes of the identity: 0 unless one document goes through the row.
        """
        problem, backend = _problem(inputs, documents, scale, backend)
        if backend == "reference":
            out, transition, state, reads = reference.begin(inputs, documents, problem.scale)
        else:
            out, transition, state, reads = _core(backend).begin(problem)
        return Beginning(out, Summary(transition, state), reads)

    def received(self, summary: Summary, inputs: Inputs) -> Summary:
        """The summary as it is."""
        return summary

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """`earlier` followed by `later`."""
        return Summary(later.transition @ earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition state + the summary's own."""
        return summary.state + summary.transition @ state

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
        """Adds reads_t state to `out` in place, in rows that continue a document, and returns it."""
        assert reads is not None
        problem, _ = _problem(inputs, documents, scale, backend)
        entering = problem.entering(state)
        for tokens in _reached(reads, problem.reach):
            found = torch.einsum("bthk,bhkv->bthv", reads[:, tokens].to(entering.dtype), entering)
            out[:, tokens] += found.to(out.dtype)
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
        """(The gradients of the inputs in their types, gradient of the initial state)."""
        problem, backend = _problem(inputs, documents, scale, backend)
        if backend == "reference":
            state = problem.new_states() if initial_state is None else initial_state
            return reference.backward(dout, dfinal_state, inputs, state, documents, problem.scale)
        return _core(backend).backward(problem, dout, dfinal_state, initial_state)

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
        """Σ_t reads_tᵀ do_t `[B, H, K, V]` over the tokens that an entering state reaches."""
        assert reads is not None
        problem, _ = _problem(inputs, documents, scale, backend)
        total, dtype = problem.new_states(), problem.dtype
        for tokens in _reached(reads, problem.reach):
            total += torch.einsum("bthk,bthv->bhkv", reads[:, tokens].to(dtype), dout[:, tokens].to(dtype))
        return total

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transitionᵀ dstate + local."""
        return local + summary.transition.mT @ dstate


recurrence = DeltaRecurrence()


def _core(backend: str) -> ModuleType:
    """What runs in chunks: torch on any device, or Triton's kernels, which are imported when first wanted."""
    if backend == "triton":
        from . import triton

        return triton
    return chunked


def _reached(reads: Tensor, reach: int) -> Iterator[slice]:
    """The tokens that an entering state reaches; on a CPU in pieces, and no further than where it has faded."""
    piece = PIECE if reads.device.type == "cpu" else max(reach, 1)
    for start in range(0, reach, piece):
        tokens = slice(start, min(start + piece, reach))
        if reads.device.type == "cpu" and not bool(reads[:, tokens].any()):
            return
        yield tokens


def _problem(inputs: Inputs, documents: Documents, scale: float | None, backend: str) -> tuple[Problem, str]:
    """The call, and the implementation that runs it."""
    q, k, v, beta, log_decay, a, b = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    documents.require(*v.shape[:2])
    factor = k.shape[-1] ** -0.5 if scale is None else scale
    problem = Problem(q, k, v, beta, log_decay, a, b, documents, factor)
    return problem, resolve("delta_rule", backend, q.device, q.dtype)


def flops(tokens: int, *, heads: int, key_dim: int, value_dim: int, general: bool = False, chunk: int = CHUNK) -> int:
    """Floating-point operations of a forward pass in chunks of C: 6 K V + C (4 K + 3 V) a token and head.

    Reading, erasing and writing the state take 2 K V each; the scores of rows and of queries 2 C K each, the solve C V
    and what is read within the chunk 2 C V. `general` is with `erase`: 2 K V + 4 C (K + V) more for what it also
    writes.
    """
    each = 6 * key_dim * value_dim + chunk * (4 * key_dim + 3 * value_dim)
    if general:
        each += 2 * key_dim * value_dim + 4 * chunk * (key_dim + value_dim)
    return tokens * heads * each


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
    element_bytes: int = 4,
) -> int:
    """Bytes that a rank sends forward and backward: transitions and states of its spans, then states, to all others.

    The length of the sequence does not matter.
    """
    forward = key_dim * (key_dim + value_dim)
    backward = key_dim * value_dim
    return (ranks - 1) * spans * batch * heads * (forward + backward) * element_bytes
