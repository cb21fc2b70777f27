"""What a linear recurrence offers besides its public op, so that any of them can be run on parts of a sequence."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from .documents import Documents

Inputs: TypeAlias = tuple[Tensor | None, ...]
"""The tensors of an op in the order of its positional arguments; what was not given is None."""


class Summary(NamedTuple):
    """What a stretch of tokens does to a state: `state_after = transition (*) state_before + state`.

    `(*)` is the op's own product: elementwise with broadcasting for diagonal recurrences, a matrix product for
    delta rules. `transition` is exactly 0 where nothing of the state before survives, as at a document's start.
    Both tensors are float32, or float64 for float64 inputs, and have the batch as dimension 0.
    """

    transition: Tensor
    state: Tensor


class Beginning(NamedTuple):
    """A run of rows from nothing: their outputs, what they do to a state, and what reads the state that enters.

    `out` is not yet rounded, so that `correct` adds to it first. Row t of `reads` `[B, T, H, K]` times the entering
    state is what that state contributes to the output of token t; None where `correct` finds it cheaply again. Both
    are float32, or float64 for float64 inputs.
    """

    out: Tensor
    summary: Summary
    reads: Tensor | None


class Recurrence(Protocol):
    """A recurrence that can be run on stretches of a row and put together across them.

    All methods run without autograd on explicit tensors. `documents` are those of the tokens given, row by row; a
    state enters a row only where its first token continues a document begun before (`documents.continues`), and the
    final state is the one after the row's last token (`nothing` where that is padding). With segments of a row in
    order,

        out, summary, reads = begin(inputs, documents)                every segment at once; summaries are gathered
        before = advance(summary_s, before) for the earlier s         the state that enters
        out = correct(out, inputs, before, documents, reads)

    The gradient is the mirror image: `summarize_backward` in every segment, one gather, `retreat` from right to left,
    then one `backward` given the state that enters and the gradient of the state that leaves.

    Variants of an op that are not tensors (how a state is read, say) are fields of the object.
    """

    def check(self, inputs: Inputs, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        ...

    def like(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Empty tensors of the shapes and types of the output, the state and the transition for such inputs."""
        ...

    def reads_like(self, inputs: Inputs) -> Tensor | None:
        """An empty tensor of the shape of `Beginning.reads`, in the type in which it is kept for backward."""
        ...

    def nothing(self, state: Tensor) -> Tensor:
        """The state before any token, shaped like `state`."""
        ...

    def forward(
        self,
        inputs: Inputs,
        initial_state: Tensor | None,
        documents: Documents,
        *,
        scale: float | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """The output of every token and the state after each row's last token."""
        ...

    def begin(
        self, inputs: Inputs, documents: Documents, *, scale: float | None = None, backend: str = "auto"
    ) -> Beginning:
        """A run from nothing, as parts of the run that is wanted."""
        ...

    def received(self, summary: Summary, inputs: Inputs) -> Summary:
        """A gathered summary in the form that `combine`, `advance` and `retreat` take, given any segment's inputs.

        The summary of `begin` is what travels; most ops need nothing more. Constants among the inputs may make a
        transition of fewer numbers.
        """
        ...

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """The summary of `earlier` followed by `later`; associative."""
        ...

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """The state after the summarized tokens, given the state before them."""
        ...

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
        """Adds to `out`, computed from nothing, what the entering `state` contributes: in place, and returned."""
        ...

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
        """The gradients of the inputs (None for an input that is None) and of the initial state."""
        ...

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
        """The gradient of the initial state that the rows' own outputs give, as if the final state had none."""
        ...

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """The gradient of the state before the summarized tokens, given that of the state after them."""
        ...


class Elementwise:
    """What recurrences with elementwise transitions have in common; they find again what reads an entering state.

    Besides the protocol they have `summarize(inputs, final_state, documents, *, backend)`, the summary of rows given
    the final state of their run from nothing, and their `forward` has a setting `exact`: outputs in what is computed
    in.
    """

    def reads_like(self, inputs: Inputs) -> None:
        """None."""

    def begin(
        self: Any, inputs: Inputs, documents: Documents, *, scale: float | None = None, backend: str = "auto"
    ) -> Beginning:
        """The run from nothing, its outputs in what is computed in, and its summary."""
        out, final_state = self.forward(inputs, None, documents, scale=scale, backend=backend, exact=True)
        return Beginning(out, self.summarize(inputs, final_state, documents, backend=backend), None)
