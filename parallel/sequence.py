"""Sequence: the argument of ops that says which part of which rows this rank holds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.derived import Deriving, Key
from ..kernels.documents import Documents, per_token
from ..kernels.masks import Pattern
from ..kernels.operation import Kept
from ..kernels.pointwise import Rotation, rotations
from .decoding_cache import DecodingCache, Stretch
from .layout import Layout
from .mesh import Experts, Group, Heads, Mesh
from .strategy import Strategy


class _Derived:
    """What the sequences of all layers share: values derived from documents and layout, and how to remake one."""

    def __init__(self) -> None:
        self.values: dict[Key, Any] = {}
        self.copies: dict[Key, Any] = {}
        self.rotations: dict[Key, tuple[Tensor, Tensor]] = {}  # by (Rotation, device, type); devices compute them

    def keep_origin(self, seq: Sequence) -> None:
        """Remembers the first sequence that it belongs to, as long as that one's handle lives."""
        if not hasattr(self, "origin"):
            names = ("documents", "layout", "rank", "group", "strategy", "heads", "backend")
            self.origin = {name: getattr(seq, name) for name in names}
            _live[int(seq.handle)] = self
            seq.handle.derived = self  # type: ignore[attr-defined]  # backward holds the handle, and with it this


_live: WeakValueDictionary[int, _Derived] = WeakValueDictionary()
_numbers = itertools.count()


def _new_handle() -> Tensor:
    return torch.tensor(next(_numbers), device="cpu")


@dataclass(frozen=True)
class Sequence(Deriving):
    """Rows of packed documents, of which the layout assigns some spans to this rank.

    documents: the documents of the whole rows, on the host: every rank knows them, so that masks, states and
        positions of other ranks' tokens are derived rather than sent.
    layout: which spans of a row each rank holds.     rank, group: this rank among those that share the rows.
    layer: the layer that calls.                      strategy: by which exchange each kind of op runs.
    heads: those ranks that exchange tokens for heads, where the strategy is "ulysses".
    experts: those ranks that share out the experts of mixtures of experts, of these rows and perhaps of others.
    backend: of the kernels ("auto", "reference", …). cache: what decoding carries, owned by the caller.
    handle: a number, as a tensor on the host, by which compiled graphs name the sequence.
    kept: see `Kept`; made by the model for each layer and forward when it recomputes activations.
    slots: in a rehearsal, the slots that the layer's ops have used so far.
    mixer, exchanges: in a rehearsal, the part that runs by its name in the pattern, and (such a name, kind of op) for
        every op so far that a strategy applies to.

    An argument, never ambient state: recomputation under activation checkpointing runs on other threads.
    """

    documents: Documents
    layout: Layout
    rank: int = 0
    group: Group | None = None
    layer: int = 0
    strategy: Strategy = field(default_factory=Strategy)
    heads: Heads | None = None
    backend: str = "auto"
    cache: DecodingCache | None = None
    kept: Kept | None = None
    slots: set[str] | None = None
    mixer: str = ""
    exchanges: set[tuple[str, str]] | None = None
    experts: Experts | None = None
    _derived: _Derived = field(default_factory=lambda: _Derived(), repr=False, compare=False)
    handle: Tensor = field(default_factory=lambda: _new_handle(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.documents.length != self.layout.length:
            raise ValueError(
                f"documents must cover the layout's rows of {self.layout.length} tokens; got {self.documents.length}"
            )
        if (self.group is None) != (self.layout.ranks == 1):
            raise ValueError(f"a group must come with more than one sequence rank; got {self.layout.ranks} rank(s)")
        self._derived.keep_origin(self)

    @classmethod
    def of(cls, handle: Tensor) -> Sequence:
        """The sequence that a compiled graph runs on, by its `handle`; the layer is not kept."""
        derived = _live[int(handle)]
        return cls(**derived.origin, _derived=derived, handle=handle)

    @classmethod
    def shared(cls, documents: Documents, layout: Layout, mesh: Mesh, strategy: Strategy) -> Sequence:
        """Rows shared by the sequence ranks of a mesh."""
        ranks = {"heads": mesh.heads, "experts": mesh.experts}
        return cls(documents, layout, mesh.sequence_rank, mesh.sequence_group, strategy=strategy, **ranks)

    @classmethod
    def single(cls, documents: Documents, *, backend: str = "auto") -> Sequence:
        """Whole rows on one device."""
        return cls(documents, Layout(documents.length), backend=backend)

    @classmethod
    def rehearsal(cls, documents: Documents, layout: Layout, strategy: Strategy, ulysses: int = 1) -> Sequence:
        """The sequence of the first rank, for tensors on `meta`: shapes are those of a run, and nothing is sent.

        `ulysses` of the ranks exchange tokens for heads. The process groups are placeholders without members.
        """
        group = None if layout.ranks == 1 else dist.ProcessGroup(0, layout.ranks)  # type: ignore[call-arg]
        heads = None if group is None or ulysses == 1 else Heads(ulysses, group)
        return cls(documents, layout, group=group, strategy=strategy, heads=heads, slots=set(), exchanges=set())

    @classmethod
    def decoding(
        cls, cache: DecodingCache, batch: int, length: int, *, backend: str = "auto", experts: Experts | None = None
    ) -> Sequence:
        """The next `length` tokens of one document per row, after the `cache.length` columns that the cache has seen.

        Where ranks share the cache each of them has all the tokens. Raises ValueError for more than it has room for.
        """
        cache.require(length)
        documents = cache.columns.documents(batch, (Stretch(0, length, cache.length),))
        return cls(documents, Layout(length), backend=backend, cache=cache, experts=experts)

    @classmethod
    def prefilling(cls, cache: DecodingCache, batch: int, layout: Layout, experts: Experts | None = None) -> Sequence:
        """The first tokens of one document per row, dealt to the ranks that share the cache, more than one.

        Ops run by a ring and by state passing, and leave keys and values where they are.
        """
        cache.require(layout.length)
        columns, whole = cache.columns, Stretch(0, layout.length, 0)
        columns.shared = layout.length
        documents = columns.documents(batch, (whole,))
        return cls(documents, layout, columns.rank, columns.group, cache=cache, experts=experts)

    @property
    def decodes(self) -> bool:
        """Whether each rank has all tokens, and keys of earlier ones come from the cache."""
        return self.cache is not None and self.layout.ranks == 1

    @property
    def last_token(self) -> Sequence:
        """Of a sequence that decodes: the same for the last of its tokens alone."""
        documents = self.documents.slice(self.layout.length - 1, self.layout.length)
        return replace(self, documents=documents, layout=Layout(1), _derived=_Derived(), handle=_new_handle())

    def at(self, layer: int, mixer: str = "") -> Sequence:
        """The same sequence as layer `layer` sees it, whose mixer the model's pattern calls `mixer`."""
        slots = None if self.slots is None else set[str]()
        return replace(self, layer=layer, strategy=self.strategy.of(mixer), slots=slots)

    def within(self, part: str, mixer: str) -> Sequence:
        """The sequence as one part of the layer sees it, a mixer that is called `mixer`: with slots of its own."""
        strategy = self.strategy.of(mixer)
        if self.cache is None and self.kept is None and self.slots is None and strategy == self.strategy:
            return self
        return replace(
            self,
            strategy=strategy,
            cache=None if self.cache is None else self.cache.of(part),
            kept=None if self.kept is None else self.kept.of(part),
            slots=None if self.slots is None else set[str](),
            mixer=mixer,
        )

    def exchange(self, kind: str) -> str:
        """The strategy of an op of this kind, "attention" or "recurrent"."""
        if self.exchanges is not None:
            self.exchanges.add((self.mixer, kind))
        return getattr(self.strategy, kind)

    @property
    def by_heads(self) -> Sequence:
        """The sequence after tokens are exchanged for heads: this rank holds all tokens of its `heads` group.

        Neighbours hold neighbouring spans, dealt back and forth: together they hold the longer spans that a layout of
        fewer ranks deals the same way.
        """
        heads = self.heads
        if heads is None:
            return self
        return self.derive(_by_heads, heads.ranks)

    @property
    def attention_layout(self) -> Layout:
        """How the tokens of softmax attention are dealt to ranks, for mixers without a strategy of their own."""
        return self.by_heads.layout if self.strategy.attention == "ulysses" else self.layout

    def up_to(self, position: int) -> Sequence:
        """The sequence in which each document ends before `position`: what follows in it is padding."""
        return self.derive(_up_to, position)

    @property
    def local(self) -> Documents:
        """Documents of this rank's `[B, T]` tokens, span after span."""
        return self.documents_of(self.rank)

    def documents_of(self, rank: int) -> Documents:
        """Documents of the tokens that `rank` holds."""
        return self.derive(_documents_of, rank)

    @property
    def spans(self) -> Documents:
        """Documents of this rank's spans folded into the batch: `[spans * B, span_length]`, span-major."""
        if self.layout.ranks == 1:
            return self.local
        return self.derive(_spans)

    @property
    def places(self) -> int:
        """Tokens and padding of this rank: B * T."""
        return self.local.batch * self.local.length

    @property
    def tokens(self) -> int:
        """This rank's tokens, without padding."""
        return self.local.tokens

    def pairs(self, mask: Pattern) -> int:
        """How many (query, key) pairs of the row this rank's queries see."""
        return self.derive(_pairs, mask)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: in-document positions of this rank's tokens."""
        return self.reach(device).clamp(min=0) if torch.compiler.is_compiling() else self.local.positions(device)

    def positions_within(self, most: int, device: torch.device | str = "cpu", setting: str = "max_length") -> Tensor:
        """As `positions`. Raises ValueError, on every rank alike, for a document of more than `most` tokens."""
        if torch.compiler.is_compiling():
            shape = self.documents.batch, self.layout.local_length
            return _positions_within(self.handle, most, setting, *shape, torch.device(device))
        if (longest := self.derive(_longest)) > most:
            raise ValueError(
                f"{setting} must be at least the length of every document; got {most} for one of {longest} tokens. "
                "Raise it, or shorten the rows"
            )
        return self.positions(device)

    def reach(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: how many tokens of its document are before each of this rank's tokens; −1 for padding."""
        if torch.compiler.is_compiling():
            return _reach(self.handle, self.documents.batch, self.layout.local_length, torch.device(device))
        return self.local.on(device, _tokens_before)

    def tokens_after(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 `[B, T]`: how many tokens of its document the row has after each of this rank's; −1 for padding."""
        return self.on(device, _tokens_after)

    def rotations(self, rotation: Rotation, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the angles of this rank's tokens, `[B, T, R/2]`, as `kernels.pointwise.rotate` takes them.

        Computed once for all layers, for queries and keys, forward and recomputation. Raises ValueError, on every rank
        alike, for a document of more tokens than the rotation's `longest`.
        """
        if torch.compiler.is_compiling():
            shape = self.documents.batch, self.layout.local_length, rotation.dims // 2
            return _rotations(self.handle, rotation.name(), *shape, device, dtype)
        key, made = (rotation, device, dtype), self._derived.rotations
        if key not in made:
            longest, factor = rotation.longest, rotation.frequencies()[1]
            positions = (
                self.positions(device)
                if longest is None
                else self.positions_within(longest, device, "rope_scaling.length")
            )
            made[key] = rotations(positions, self.on(device, _frequencies, rotation), factor, dtype)
        return made[key]

    def shard(self, x: Tensor) -> Tensor:
        """`[B, N, …]` of the whole rows to the `[B, T, …]` of this rank."""
        return self.layout.shard(x, self.rank)

    def fold(self, x: Tensor) -> Tensor:
        """`[B, T, …]` to `[spans * B, span_length, …]`, the form in which recurrent ops see their segments."""
        return x if self.layout.ranks == 1 else torch.cat(x.split(self.layout.span_length, dim=1), dim=0)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x if self.layout.ranks == 1 else torch.cat(x.chunk(self.layout.spans, dim=0), dim=1)

    def claim(self, slot: str) -> None:
        """Raises ValueError, in a rehearsal, for a slot that another op of the layer uses: they would share a state."""
        if self.slots is None:
            return
        if slot in self.slots:
            raise ValueError(
                f"slot must differ between the ops that a mixer calls; got {slot!r} twice. Name one of them otherwise: "
                f"slot={slot + ' 2'!r}"
            )
        self.slots.add(slot)

    @property
    def derived(self) -> dict[Key, Any]:
        """What was derived on the host: shared by the sequences of all layers."""
        return self._derived.values

    @property
    def copies(self) -> dict[Key, Any]:
        """Copies of derived tensors on devices: shared by the sequences of all layers."""
        return self._derived.copies


def _by_heads(seq: Sequence, ranks_of_heads: int) -> Sequence:
    assert seq.heads is not None
    ranks = seq.layout.ranks // ranks_of_heads
    layout = Layout(seq.layout.length, ranks, seq.layout.spans if ranks > 1 else 1)
    return Sequence(seq.documents, layout, seq.rank // ranks_of_heads, seq.heads.ring, backend=seq.backend)


def _up_to(seq: Sequence, position: int) -> Sequence:
    return Sequence(seq.documents.up_to(position), seq.layout, seq.rank, seq.group, backend=seq.backend)


def _documents_of(seq: Sequence, rank: int) -> Documents:
    return seq.layout.documents(seq.documents, rank)


def _spans(seq: Sequence) -> Documents:
    return seq.layout.span_documents(seq.documents, seq.rank)


def _pairs(seq: Sequence, mask: Pattern) -> int:
    tile = mask.tile(seq.local, seq.documents)
    return 0 if tile is None else tile.pairs


def _tokens_before(documents: Documents) -> Tensor:
    """int32 `[B, T]`: how many tokens of its document are before each token; −1 for padding."""
    return documents.positions().masked_fill(documents.ids() < 0, -1)


def _tokens_after(seq: Sequence) -> Tensor:
    local, whole = seq.local, seq.documents
    ends = whole.columns.end_position[whole.lines(local.columns).clamp(min=0)]
    return (per_token(local, ends.int()) - local.positions() - 1).masked_fill(local.ids() < 0, -1)


def _longest(seq: Sequence) -> int:
    """How many tokens the longest document of the whole rows has, so far where it is decoded."""
    ends = seq.documents.columns.end_position[seq.documents.columns.real]
    return int(ends.max()) if len(ends) else 0


def _frequencies(seq: Sequence, rotation: Rotation) -> Tensor:
    return rotation.frequencies()[0]


@torch.library.custom_op("longreach::reach", mutates_args=())
def _reach(handle: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """`Sequence.reach` as compiled graphs see it: of the sequence that the handle stands for, not of the traced one."""
    return Sequence.of(handle).reach(device).clone()  # the graph may write over what an op returns


@_reach.register_fake
def _(handle: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(batch, length, dtype=torch.int32, device=device)


@torch.library.custom_op("longreach::positions_within", mutates_args=())
def _positions_within(handle: Tensor, most: int, setting: str, batch: int, length: int, device: torch.device) -> Tensor:
    """`Sequence.positions_within` as compiled graphs see it."""
    return Sequence.of(handle).positions_within(most, device, setting).clone()


@_positions_within.register_fake
def _(handle: Tensor, most: int, setting: str, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(batch, length, dtype=torch.int32, device=device)


@torch.library.custom_op("longreach::rotations", mutates_args=())
def _rotations(
    handle: Tensor, rotation: str, batch: int, length: int, half: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`Sequence.rotations` as compiled graphs see it."""
    cos, sin = Sequence.of(handle).rotations(Rotation.named(rotation), device, dtype)
    return cos.clone(), sin.clone()


@_rotations.register_fake
def _(
    handle: Tensor, rotation: str, batch: int, length: int, half: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.empty(batch, length, half, dtype=dtype, device=device) for _ in range(2))
    return cos, sin
