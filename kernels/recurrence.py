"""Recurrence: what ops with a state have in common, and the protocol by which they run on parts of a row.

An op says its mathematics: a record of its inputs, their shapes, what is special about them, and what a row does to a
state. The base class does the rest: checks, documents, the choice of an implementation, types and autograd.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor

from . import operation
from .dims import named, require_shapes, shape_of, sizes_of
from .dispatch import BACKENDS, asked, best, resolve
from .documents import Documents
from .operation import Tensors, recording
from .problem import Problem, Record, Rows, accumulator

PIECE = 1024  # tokens of one product with what reads an entering state, on a CPU


class Summary(NamedTuple):
    """What a stretch of tokens does to a state: `state_after = transition (*) state_before + state`.

    `(*)` is the op's own product: elementwise with broadcasting for diagonal recurrences, a matrix product for
    delta rules. `transition` is exactly 0 where no part of the state before survives, as at a document's start.
    Both tensors are float32, or float64 for float64 inputs, and have the batch as dimension 0.
    """

    transition: Tensor
    state: Tensor


class Beginning(NamedTuple):
    """A run of rows from the zero state: their outputs, what they do to a state, and what reads the state that enters.

    `out` is not yet rounded, so that `correct` adds to it first. Row t of `reads` `[B, T, H, K]` times the entering
    state is what that state contributes to the output of token t; None for ops whose `correct` computes it again.
    """

    out: Tensor
    summary: Summary
    reads: Tensor | None


class Recurrence(ABC, Generic[Record]):
    """An op with a state, which can be run on segments of a row and put together across them.

    A class with settings that are not tensors (how a state is read, say) is a frozen dataclass of them. Everything
    runs without autograd. A state enters a row only where its first token continues a document begun before
    (`documents.continues`); the final state is the one after the row's last token (`zero_state` where that is
    padding). With segments of a row in order,

        out, summary, reads = begin(problem)                          every segment at once; summaries are gathered
        before = advance(expand(summary_s), before) for earlier s     the state that enters
        out = correct(problem, out, before, reads)

    where several segments are combined first, and then advanced over as one. The gradient is the mirror image:
    `summarize_backward` in every segment, one gather, `combine_backward` and `retreat` from right to left, then one
    `backward`, given the state that enters and the gradient of the state that leaves.

    name: of the public op.    record: the class of its inputs, a NamedTuple; None stands for a tensor that is left out.
    dims: the dimensions of each input, as `kernels.dims` writes them; "B T …" is a sequence. `out`, `state`: those of
        the output and of the state, whose dimension 1, heads or channels, is what Ulysses shares among ranks.
    common: places of the sequences without that dimension.    scale: of the queries, None for K^(-1/2).
    raw: whether outputs are finished outside the op, and so are in the type of the accumulators.
    keeps_reads: whether `backward` takes `reads` after the other arguments, those of `run` where no rank shares the
        rows.
    """

    name: ClassVar[str]
    record: ClassVar[type]
    dims: ClassVar[dict[str, str]]
    common: ClassVar[tuple[int, ...]] = ()
    out: str
    state: str
    scale: float | None = 1.0
    raw: bool = False
    keeps_reads: ClassVar[bool] = False

    # What an op says of itself.

    def check_inputs(self, inputs: Record) -> None:
        """Raises ValueError where inputs, of shapes that may be, do not fit the op or its settings."""

    def implementation(self, backend: str) -> Any:
        """What runs `backend` ("triton", "chunked", "reference"): the module of that name in the op's package.

        An op with a `reference` alone runs that everywhere; it may also have its `forward` in its own module.

        It has `forward(problem, initial_state) -> (out, final state)` and may have, instead of what the base class
        makes of that by autograd, `backward(problem, dout, dfinal_state, initial_state) -> (gradients of the inputs,
        gradient of the initial state)`, `correct(problem, out, state) -> out` and
        `summarize_backward(problem, dout, initial_state) -> gradient of the initial state`.

        "library" has `refusal(problem)` besides, which says why it cannot run a problem, or None. It gets rows of which
        no rank holds more.
        """
        return _implementation(type(self).__module__, backend)

    def transition_dims(self, inputs: Record) -> str:
        """The dimensions of the transition as it travels, as `state` names them."""
        return self.state

    def reads_dims(self) -> str | None:
        """Those of `Beginning.reads`, which are kept for backward in the inputs' type."""
        return None

    def zero_state(self, like: Tensor) -> Tensor:
        """The state before any token, shaped like `like`."""
        return torch.zeros_like(like)

    def with_units(self, dstate: Tensor, state: Tensor) -> Tensor:
        """The gradient of a state, in which what is no variable of the state is as in `state`."""
        return dstate

    # The parts of a run.

    def run(self, problem: Problem[Record], initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output of rows that no other rank shares, and the reads that are kept for backward."""
        return problem.implementation.forward(problem, initial_state)[0], None

    @abstractmethod
    def begin(self, problem: Problem[Record]) -> Beginning:
        """An exact run from the zero state, as parts of the run that is wanted."""

    def expand(self, summary: Summary, inputs: Record) -> Summary:
        """Gathered summaries in the form that `combine`, `advance` and `retreat` take, given any segments' inputs.

        Most ops need no more than the summary of `begin`, which travels. Constants among the inputs may make a
        transition of fewer numbers. The batch of the summaries is not that of the inputs.
        """
        return summary

    @abstractmethod
    def combine(self, later: Summary, earlier: Summary) -> Summary:
        """The summary of `earlier` followed by `later`; associative."""

    @abstractmethod
    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """The state after the summarized tokens, given the state before them."""

    @abstractmethod
    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """The gradient of the state before the summarized tokens, given that of the state after them."""

    def combine_backward(self, earlier: Summary, later: Summary) -> Summary:
        """The summary over which one `retreat` is that over `later` and then that over `earlier`.

        The states of such summaries are gradients, what `retreat` gets as `local`.
        """
        return Summary(self.combine(later, earlier).transition, self.retreat(earlier, later.state, earlier.state))

    def correct(self, problem: Problem[Record], out: Tensor, state: Tensor, reads: Tensor | None) -> Tensor:
        """Adds to `out`, computed from the zero state, what the entering `state` contributes; in place."""
        if hasattr(problem.implementation, "correct"):
            return problem.implementation.correct(problem, out, state)
        run = problem.implementation.forward
        return out.add_(run(problem, state)[0] - run(problem, None)[0])

    def backward(
        self, problem: Problem[Record], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensors, Tensor]:
        """The gradients of the inputs, in their types (None for None), and of the initial state.

        That of an op that `keeps_reads` also takes `reads`, which are None where no forward has kept any.
        """
        if hasattr(problem.implementation, "backward"):
            return problem.implementation.backward(problem, dout, dfinal_state, initial_state)
        return self._differentiate(problem, dout, dfinal_state, initial_state)

    def summarize_backward(
        self, problem: Problem[Record], dout: Tensor, initial_state: Tensor | None, reads: Tensor | None
    ) -> Tensor:
        """The gradient of the initial state that the rows' own outputs give, as if the final state had none."""
        if hasattr(problem.implementation, "summarize_backward"):
            return problem.implementation.summarize_backward(problem, dout, initial_state)
        return self._differentiate(problem, dout, None, initial_state)[1]

    def _differentiate(
        self, problem: Problem[Record], dout: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensors, Tensor]:
        """`backward` by autograd through a forward that is written in differentiable operations."""
        state = self.zero_state(problem.new_states()) if initial_state is None else initial_state
        with recording():
            leaves = [None if x is None else x.detach().requires_grad_() for x in (*problem.inputs, state)]
            again = replace(problem, inputs=self.record(*leaves[:-1]))
            out, final = problem.implementation.forward(again, leaves[-1])
            dfinal = torch.zeros_like(final) if dfinal_state is None else dfinal_state.to(final.dtype)
            present = [x for x in leaves if x is not None]
            gradients = iter(
                torch.autograd.grad(
                    [out, final], present, [dout.to(out.dtype), dfinal], allow_unused=True, materialize_grads=True
                )
            )
        *dinputs, dinitial = (None if x is None else next(gradients) for x in leaves)
        assert dinitial is not None
        return tuple(dinputs), self.with_units(dinitial, state)

    # Calls.

    def __call__(
        self, inputs: Record, initial_state: Tensor | None = None, documents: Documents | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(output, final state) on one device, differentiable in every input: what a public op returns.

        Without documents each row is one, begun before where there is an initial state. Raises ValueError for inputs
        that do not fit, or a backend that cannot run.
        """
        self.check(inputs, initial_state)
        if documents is None:
            documents = Documents.whole(*inputs[0].shape[:2], position=0 if initial_state is None else 1)
        out, final = operation.run(Rows(self, backend), (*inputs, initial_state), documents)
        return out, final

    def problem(
        self, tensors: Tensors, documents: Documents, *, backend: str = "auto", exact: bool = False
    ) -> Problem[Record]:
        """The call for these inputs. Raises ValueError for documents of other tokens, or a backend that cannot run."""
        inputs = self.record(*tensors)
        first = inputs[0]
        documents.require(*first.shape[:2])
        offered, why = _offered(type(self).__module__), None
        if first.shape[1] == 1 and asked(self.name, backend) == "auto" and best(first.device, first.dtype) == "chunked":
            offered, why = ("reference",), "the recurrence itself, for a single token"
        chosen = resolve(self.name, backend, first.device, first.dtype, offered, why)
        problem = Problem(self, inputs, documents, chosen, exact or self.raw)
        if chosen == "library" and (refusal := _implementation(type(self).__module__, chosen).refusal(problem)):
            raise ValueError(f"backend must be one that can run; got 'library' for {self.name}: {refusal}. Use 'auto'")
        return problem

    def check(self, tensors: Tensors, initial_state: Tensor | None = None) -> None:
        """Raises ValueError where shapes or values do not fit; looks at values only of tensors on the host."""
        inputs = self.record(*tensors)
        sizes = require_shapes(self.dims, inputs)
        if inputs[0].shape[1] == 0:
            raise ValueError("the sequence must have at least one token; got none. Leave empty segments out")
        for name, x in zip(self.dims, inputs, strict=True):
            if name.endswith("log_decay") and x is not None and x.device.type == "cpu":
                greatest = float(x.detach().max())
                if greatest > 0:
                    raise ValueError(f"{name} must not be positive; got {greatest}. Pass the logarithm of the decay")
        self.check_inputs(inputs)
        if initial_state is not None and tuple(initial_state.shape) != (shape := shape_of(self.state, sizes)):
            raise ValueError(
                f"initial_state must be {named(self.state)} = {list(shape)}; got {list(initial_state.shape)}. "
                "Pass the final state of the tokens before"
            )

    def empty_results(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Empty tensors of the shapes and types of the output, the state, the transition and the reads."""
        inputs = self.record(*tensors)
        sizes, first = sizes_of(self.dims, inputs), inputs[0]
        exact, reads = accumulator(first), self.reads_dims()
        return (
            first.new_empty(shape_of(self.out, sizes), dtype=exact if self.raw else first.dtype),
            first.new_empty(shape_of(self.state, sizes), dtype=exact),
            first.new_empty(shape_of(self.transition_dims(inputs), sizes), dtype=exact),
            None if reads is None else first.new_empty(shape_of(reads, sizes)),
        )

    def state_bytes(self, tensors: Tensors) -> int:
        """Bytes of the state that decoding keeps, whatever the length."""
        return self._bytes(tensors, self.state)

    def bytes_sent(self, tensors: Tensors, ranks: int, spans: int = 1) -> int:
        """Bytes that a rank sends forward and backward: of each of its spans state and transition, then the state's
        gradient, to all others. The length of the sequence does not matter.
        """
        transition = self._bytes(tensors, self.transition_dims(self.record(*tensors)))
        return (ranks - 1) * spans * (transition + 2 * self._bytes(tensors, self.state))

    def _bytes(self, tensors: Tensors, dims: str) -> int:
        inputs = self.record(*tensors)
        return math.prod(shape_of(dims, sizes_of(self.dims, inputs))) * accumulator(inputs[0]).itemsize


class Diagonal(Recurrence[Record]):
    """A recurrence whose transition multiplies the state elementwise: it runs once from zero and is corrected."""

    def begin(self, problem: Problem[Record]) -> Beginning:
        out, final = problem.implementation.forward(problem, None)
        return Beginning(out, Summary(self.transition(problem), final), None)

    def transition(self, problem: Problem[Record]) -> Tensor:
        """The factors of the state over whole rows, 0 unless one document goes through: what becomes of a state of 1.

        An op that knows them from its decays says so instead, and spares two runs.
        """
        run, one = problem.implementation.forward, self.one_state(problem.new_states())
        return run(problem, one)[1] - run(problem, None)[1]

    def one_state(self, like: Tensor) -> Tensor:
        """The state, shaped like `like`, that the transition (*) leaves as the transition itself."""
        return torch.ones_like(like)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(later.transition * earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition ⊙ state + the summary's own."""
        return torch.addcmul(summary.state, summary.transition, state)

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transition ⊙ dstate + local."""
        return torch.addcmul(local, summary.transition, dstate)


class Dense(Recurrence[Record]):
    """A recurrence whose transition is a matrix `[K, K]`: the identity is carried beside its run from zero.

    Its implementations have `begin(problem) -> (out, transition, state, reads)`. What tokens read of an entering state
    takes the whole run, so it is kept.
    """

    def transition_dims(self, inputs: Record) -> str:
        return "B H K K"

    def reads_dims(self) -> str:
        return "B T H K"

    def begin(self, problem: Problem[Record]) -> Beginning:
        out, transition, state, reads = problem.implementation.begin(problem)
        return Beginning(out, Summary(transition, state), reads)

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return Summary(later.transition @ earlier.transition, self.advance(later, earlier.state))

    def advance(self, summary: Summary, state: Tensor) -> Tensor:
        """transition state + the summary's own."""
        return summary.state + summary.transition @ state

    def retreat(self, summary: Summary, dstate: Tensor, local: Tensor) -> Tensor:
        """transitionᵀ dstate + local."""
        return local + summary.transition.mT @ dstate

    def combine_backward(self, earlier: Summary, later: Summary) -> Summary:
        # States of no columns: their products, which nobody needs, are not computed.
        alone = self.combine(*(Summary(x.transition, x.state[..., :0]) for x in (later, earlier)))
        return Summary(alone.transition, self.retreat(earlier, later.state, earlier.state))

    def correct(self, problem: Problem[Record], out: Tensor, state: Tensor, reads: Tensor | None) -> Tensor:
        """Adds reads_t state to `out` in place, in rows that continue a document, and returns it."""
        assert reads is not None
        entering = problem.entering(state)
        for tokens in _reached(reads, problem.reach):
            contribution = torch.einsum("bthk,bhkv->bthv", reads[:, tokens].to(entering.dtype), entering)
            out[:, tokens] += contribution.to(out.dtype)
        return out

    def summarize_backward(
        self, problem: Problem[Record], dout: Tensor, initial_state: Tensor | None, reads: Tensor | None
    ) -> Tensor:
        """Σ_t reads_tᵀ do_t `[B, H, K, V]` over the tokens that an entering state reaches."""
        assert reads is not None
        total, dtype = problem.new_states(), problem.dtype
        for tokens in _reached(reads, problem.reach):
            total += torch.einsum("bthk,bthv->bhkv", reads[:, tokens].to(dtype), dout[:, tokens].to(dtype))
        return total


def _reached(reads: Tensor, reach: int) -> Iterator[slice]:
    """The tokens that an entering state reaches; on a CPU in pieces, and no further than where it has faded."""
    piece = PIECE if reads.device.type == "cpu" else max(reach, 1)
    for start in range(0, reach, piece):
        tokens = slice(start, min(start + piece, reach))
        if reads.device.type == "cpu" and not bool(reads[:, tokens].any()):
            return
        yield tokens


@lru_cache
def _offered(module: str) -> tuple[str, ...]:
    """The backends of the op that a module defines: modules of their names in its package, or its own `forward`."""
    home = sys.modules[module]
    names = tuple(x for x in BACKENDS if home.__package__ and find_spec(f"{home.__package__}.{x}") is not None)
    if not names and not hasattr(home, "forward"):
        raise ValueError(
            f"{module} must have a reference.py in its package, or a function of its own, "
            "forward(problem, initial_state) -> (out, final_state); got neither. docs/house.md shows one"
        )
    return names or ("reference",)


@lru_cache
def _implementation(module: str, backend: str) -> Any:
    home = sys.modules[module]
    own = home.__package__ and find_spec(f"{home.__package__}.{backend}") is not None
    return import_module(f"{home.__package__}.{backend}") if own else home
