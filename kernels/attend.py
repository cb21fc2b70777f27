"""Attend: the protocol of ops over keys, by which they run on one device and under every strategy across ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .blocks import BlockLayout
from .documents import Documents
from .masks.pattern import Intervals, Pattern, Tile
from .operation import Tensors, recording


class Gradient(NamedTuple):
    """The final (out, lse) of queries, merged over all keys and finished, and their incoming gradients.

    out `[B, T, H, V]` and lse `[B, T, H]` are float32 (float64 for float64); dout has the type of the queries. dlse is
    None where lse has no gradient.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None = None

    @property
    def exact(self) -> torch.dtype:
        """What gradients are added up in."""
        return self.lse.dtype

    def delta(self, dtype: torch.dtype) -> Tensor:
        """dout · out − dlse, `[B, T, H]`."""
        total = (self.dout.to(dtype) * self.out.to(dtype)).sum(-1)
        return total if self.dlse is None else total - self.dlse.to(dtype)


class Attend(ABC):
    """Attention of queries to keys that arrive in parts, whose partial results merge by log-sum-exp.

    A subclass is a frozen dataclass of plain settings with `check`, `tile`, `kept` and `attend`; the rest has defaults.
    `name` is that of the public op whose kernels it runs, if any. `record` is the NamedTuple of its inputs; its q is
    `[B, T, H, K]`. `travels` names the inputs `[B, S, …]` that are sent to the queries of other ranks, and whose
    gradients are sent back, unless they are `constant`: keys and values, and factors per key; or a latent, of which
    `attend` makes keys and values where it arrives. `without_heads` names those inputs `[B, S, …]` that all heads read
    whole. All methods run without autograd; results are float32 (float64 for float64).
    """

    name: ClassVar[str | None] = None
    record: ClassVar[type]
    travels: ClassVar[tuple[str, ...]] = ("k", "v")
    without_heads: ClassVar[tuple[str, ...]] = ()
    constant: ClassVar[bool] = False

    @abstractmethod
    def check(self, inputs: Any) -> None:
        """Raises ValueError for inputs that do not fit."""

    @abstractmethod
    def tile(self, queries: Documents, keys: Documents) -> Any:
        """What `attend` needs to know about these queries and keys; None where no query sees any key."""

    def tile_in(self, rows: Documents, queries: Documents, keys: Documents) -> Any:
        """`tile`, for an op that has to know the documents of the whole rows."""
        return self.tile(queries, keys)

    def reached(self, parts: Documents, number: int) -> Tensor:
        """bool `[P, P]`, on the host: whether a query of part i sees a key of part j, of `number` parts of the same
        rows one after the other along the batch."""
        batch = parts.batch // number
        each = [parts.rows(part * batch, (part + 1) * batch) for part in range(number)]
        return torch.tensor([[self.tile(queries, keys) is not None for keys in each] for queries in each])

    @abstractmethod
    def kept(self, length: int) -> Intervals:
        """Which of the first `length` positions queries after them can see: what a decoding cache has to keep."""

    def most_kept(self, length: int, beginnings: int = 1) -> int:
        """At most so many of `length` columns are kept at any time, of rows whose position 0 is in so many columns."""
        return length

    @abstractmethod
    def attend(self, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str) -> tuple[Tensor, Tensor]:
        """out `[B, T, H, V]` and log-sum-exp `[B, T, H]` over the keys `received`.

        Queries that see none of them have out 0 and log-sum-exp −inf, the neutral element of `merge`.
        """

    def attend_backward(
        self, gradient: Gradient, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Gradients of the inputs that stay, by name, and of what was received; both add up over parts of the keys.

        They are float32 (float64 for float64), whatever the inputs.
        By default autograd computes them from `attend`. With (out', lse') of this part and its share w = exp(lse' −
        lse) of the whole, the gradient of out' is w dout, and that of lse' is w (dout · (out' − out) + dlse).
        """
        exact = gradient.exact  # gradients are rounded once, after they are summed
        others = [(name, x) for name, x in inputs._asdict().items() if name not in self.travels and x is not None]
        stay = {name: x.detach().to(exact).requires_grad_() for name, x in others if x.is_floating_point()}
        leaves = [*stay.values(), *(x.detach().to(exact).requires_grad_() for x in received)]
        with recording():
            out, lse = self.attend(inputs._replace(**stay), tuple(leaves[len(stay) :]), tile, backend)
        unseen = lse.detach() == float("-inf")
        share = (lse.detach() - gradient.lse).exp().masked_fill(unseen, 0.0).unsqueeze(-1)
        dout = share * gradient.dout
        dlse = (dout * (out.detach() - gradient.out)).sum(-1)
        if gradient.dlse is not None:
            dlse = dlse + share.squeeze(-1) * gradient.dlse
        gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse), materialize_grads=True)
        return dict(zip(stay, gradients, strict=False)), tuple(gradients[len(stay) :])

    def decode(self, inputs: Any, received: tuple[Tensor, ...], tile: Any, backend: str) -> tuple[Tensor, Tensor]:
        """As `attend`, over all keys so far, cached and new: for an op that has a quicker way for few queries."""
        return self.attend(inputs, received, tile, backend)

    def finish(self, out: Tensor, lse: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        """What is applied to the result of the last merge."""
        return out, lse

    def finish_backward(self, gradient: Gradient, inputs: Any) -> dict[str, Tensor]:
        """Gradients of the inputs that `finish` alone uses, by name."""
        return {}

    def sent(self, inputs: Any) -> tuple[Tensor, ...]:
        """The inputs that travel."""
        return tuple(getattr(inputs, name) for name in self.travels)

    def width(self, inputs: Any) -> tuple[int, int]:
        """Heads and dim of the output: by default those of the queries and of the values."""
        return inputs.q.shape[-2], inputs.v.shape[-1]

    def zeros(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """(out, log-sum-exp) of queries that see no key."""
        exact = torch.promote_types(inputs.q.dtype, torch.float32)
        heads, dim = self.width(inputs)
        shape = *inputs.q.shape[:-2], heads
        return (
            inputs.q.new_zeros((*shape, dim), dtype=exact),
            inputs.q.new_full(shape, float("-inf"), dtype=exact),
        )


class MaskedAttend(Attend):
    """An `Attend` whose queries see the keys that `mask` shows: an attribute of the class, or one of its settings."""

    mask: Pattern

    def tile(self, queries: Documents, keys: Documents) -> Tile | None:
        return self.mask.tile(queries, keys)

    def reached(self, parts: Documents, number: int) -> Tensor:
        return self.mask.reached(parts, number)

    def kept(self, length: int) -> Intervals:
        return self.mask.kept(length)

    def most_kept(self, length: int, beginnings: int = 1) -> int:
        return self.mask.most_kept(length, beginnings)


class ListedAttend(Attend):
    """An `Attend` whose inputs list, in `blocks`, which blocks of keys each query sees."""

    @abstractmethod
    def layout(self, rows: Documents) -> BlockLayout:
        """The blocks of whole rows, as the lists number them."""

    @abstractmethod
    def check_lists(self, inputs: Any, layout: BlockLayout, queries: Documents) -> None:
        """Raises ValueError for lists that do not fit; ids are checked only for lists on the host."""

    @abstractmethod
    def tile(self, queries: Documents, keys: Documents, layout: BlockLayout | None = None) -> Any:
        """As `Attend.tile`; the keys are whole rows, or any part of the rows of `layout`."""

    @abstractmethod
    def gathered(self, tile: Any, listed: Tensor) -> Any:
        """The tile of which only the keys in `listed` blocks, bool `[B, count]`, are there, moved together.

        They stand in the order of the row, and rows may be padded. `listed` is on the device and is not read.
        """


class Attention(ABC):
    """An `Attend` as an operation. Subclasses bring the keys to the queries.

    Its output is out `[B, T, H, V]` in q's type. It saves the log-sum-exp, which is a second output where
    `returns_lse`, and the `rest` of out: gradients of peaked attention need dout · out more exactly than 16 bits say.
    """

    op: Attend
    returns_lse: ClassVar[bool] = False

    @abstractmethod
    def over_keys(self, inputs: Any, where: Any) -> tuple[Tensor, Tensor] | None:
        """(out, log-sum-exp) of the queries, before `finish`; None where they see no key."""

    @abstractmethod
    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Any
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Gradients of the inputs that stay, by name, and of this rank's inputs that travel."""

    def forward(self, inputs: Tensors, where: Any) -> tuple[Tensors, Tensors]:
        named = self.op.record(*inputs)
        self.op.check(named)
        out, lse = self.op.finish(*(self.over_keys(named, where) or self.op.zeros(named)), named)
        rounded = out.to(named.q.dtype)
        saved = rest(out, rounded)
        return ((rounded, lse), (saved,)) if self.returns_lse else ((rounded,), (saved, lse))

    def backward(
        self, gradients: Tensors, inputs: Tensors, outputs: tuple[Tensor, ...], saved: Tensors, where: Any
    ) -> Tensors:
        named = self.op.record(*inputs)
        lse = outputs[1] if self.returns_lse else saved[1]
        assert lse is not None
        dout = torch.zeros_like(outputs[0]) if gradients[0] is None else gradients[0]
        gradient = Gradient(dout, restored(outputs[0], saved[0]), lse, gradients[1] if self.returns_lse else None)
        by_name = self.op.finish_backward(gradient, named)
        stay, travelled = self.over_keys_backward(gradient, named, where)
        by_name |= stay | dict(zip(self.op.travels, travelled, strict=True))

        def of_input(name: str, x: Tensor | None) -> Tensor | None:
            if x is None or not x.is_floating_point():
                return None
            # What no visible key has touched has a gradient of 0, not none: hooks of parameters wait for one.
            return by_name[name].to(x.dtype) if name in by_name else torch.zeros_like(x)

        return tuple(of_input(name, x) for name, x in zip(named._fields, inputs, strict=True))


class OnOneDevice(Attention):
    """Attention to keys that are all on this device; `where` is (tile, backend)."""

    returns_lse = True

    def __init__(self, op: Attend) -> None:
        self.op = op

    def over_keys(self, inputs: Any, where: Any) -> tuple[Tensor, Tensor] | None:
        tile, backend = where
        return None if tile is None else self.op.attend(inputs, self.op.sent(inputs), tile, backend)

    def over_keys_backward(
        self, gradient: Gradient, inputs: Any, where: Any
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        (tile, backend), sent = where, self.op.sent(inputs)
        if tile is None:
            return {}, tuple(torch.zeros_like(x) for x in sent)
        return self.op.attend_backward(gradient, inputs, sent, tile, backend)


class Decoding(OnOneDevice):
    """The same while decoding: new queries, over cached keys and their own."""

    def over_keys(self, inputs: Any, where: Any) -> tuple[Tensor, Tensor] | None:
        tile, backend = where
        return None if tile is None else self.op.decode(inputs, self.op.sent(inputs), tile, backend)


# Binary digits of float32 that are lost to rounding and not kept by `rest`.
DROPPED = {torch.bfloat16: 8, torch.float16: 5}


def rest(exact: Tensor, rounded: Tensor) -> Tensor | None:
    """What rounding float32 numbers to 16 bits took away, to eight binary digits: int8, or None if they are as exact.

    A byte beside the rounded number instead of a second copy in float32.
    """
    if rounded.dtype == exact.dtype:
        return None
    difference = exact.view(torch.int32) - rounded.float().view(torch.int32)  # numbers of one sign are in order of bits
    dropped = DROPPED[rounded.dtype]
    return difference.add_(1 << (dropped - 1)).bitwise_right_shift_(dropped).clamp_(-128, 127).to(torch.int8)


def restored(rounded: Tensor, rest: Tensor | None) -> Tensor:
    """The float32 numbers of which `rest` is known, off by at most 2^-15 of themselves; others as they are.

    Float16 has fewer digits below 2^-14, and so has what is restored.
    """
    if rest is None:
        return rounded
    return (rounded.float().view(torch.int32) + (rest.int() << DROPPED[rounded.dtype])).view(torch.float32)


def check_keys(q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless queries are `[B, T, H, K]` and keys `[B, S, G, K]`, G dividing H."""
    if q.dim() != 4 or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"k must be [B, S, G, K] for q [B, T, H, K]; got {tuple(k.shape)} and {tuple(q.shape)}")


def documents_of(
    q: Tensor, k: Tensor, documents: Documents | None, key_documents: Documents | None = None
) -> tuple[Documents, Documents]:
    """The documents of queries `[B, T, …]` and of keys `[B, S, …]`: by default rows are whole, and keys have the first.

    Raises ValueError for documents of other tokens.
    """
    documents = Documents.whole(*q.shape[:2]) if documents is None else documents
    key_documents = documents if key_documents is None else key_documents
    for name, described, x in (("documents", documents, q), ("key_documents", key_documents, k)):
        if (described.batch, described.length) != tuple(x.shape[:2]):
            raise ValueError(
                f"{name} must describe {x.shape[0]} rows of {x.shape[1]} tokens; got {described.batch} of "
                f"{described.length}. Pass documents for the queries, and key_documents where keys are other tokens"
            )
    return documents, key_documents


def merge_weight(lse_a: Tensor, lse_b: Tensor) -> Tensor:
    """exp(lse_b) / (exp(lse_a) + exp(lse_b)), and 0 where both are −inf."""
    return torch.sigmoid(lse_b - lse_a).masked_fill_(lse_b == float("-inf"), 0.0)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together, from that over each; −inf in lse means no keys."""
    weight = merge_weight(lse_a, lse_b).unsqueeze(-1)
    return torch.lerp(out_a, out_b, weight), torch.logaddexp(lse_a, lse_b)
