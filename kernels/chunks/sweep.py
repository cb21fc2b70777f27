"""Sweeps over a block of rows and heads, slab by slab: what chunked linear ops have in common.

Backward sweeps once from the left for the states at the starts of slabs, then from the right, where each slab
recomputes its own: no more states than that are ever kept, unless an op says otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from ..operation import Tensors
from ..problem import Problem
from .centred import CentredChannelDecay
from .channel import ChannelDecay
from .decay import TokenDecay
from .slabs import Block, Borders, Grid, Lanes, LastSteps, Masks, Slab, States, blocks, rows_of

Parts: TypeAlias = dict[str, Lanes]


class Sweep(ABC):
    """One block of rows and heads: its grid of slabs, its parts of tensors, its workspaces.

    The inputs of the problem are q, k, v, log_decay and others.
    """

    token_decay: ClassVar[type[TokenDecay]] = TokenDecay
    channel_decay: ClassVar[type[ChannelDecay] | type[CentredChannelDecay]] = ChannelDecay

    def __init__(self, problem: Problem[Any], block: Block) -> None:
        self.problem, self.block, inputs = problem, block, problem.inputs
        rows, length, self.heads, values = inputs.v[block.rows, :, block.heads].shape
        self.key_dim, self.value_dim = inputs.k.shape[-1], values
        self.grid = self.new_grid(rows, self.heads, length)
        self.borders = Borders(rows_of(problem.documents, block.rows), self.grid)
        self.masks: Masks | None = None  # of the slab that is loaded
        self.works: dict[tuple[str, int], Tensor] = {}
        self.cut: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self.decay = self._decay(inputs.log_decay)
        self.constant: Tensor | None = None  # the gradient of a constant decay, where it is wanted
        self.sources = {
            name: self.part(x)
            for name, x in inputs._asdict().items()
            if x is not None and not name.endswith("log_decay")
        }

    @classmethod
    def over(cls, problem: Problem[Any]) -> list[Self]:
        """Sweeps over all rows and heads."""
        batch, _, heads, _ = problem.inputs.v.shape
        grouped = (getattr(problem.inputs, name, None) for name, dims in problem.op.dims.items() if "G" in dims)
        repeats = math.lcm(*(heads // x.shape[2] for x in grouped if x is not None))
        return [cls(problem, block) for block in blocks(batch, heads, heads // repeats)]

    @abstractmethod
    def new_grid(self, rows: int, heads: int, length: int) -> Grid:
        """How a block of this size is cut."""

    @abstractmethod
    def load(self, slab: Slab, *, reads: bool = True) -> None:
        """Reads the slab's inputs and decays; without `reads` only what states take."""

    @abstractmethod
    def advance(self, slab: Slab, states: States) -> None:
        """Fills the states after each chunk, from the one before the first. After `load`."""

    @abstractmethod
    def read(self, slab: Slab, states: States, out: Tensor) -> None:
        """Writes the outputs of the slab's tokens to `out` `[N, C, V]`. After `advance`."""

    @abstractmethod
    def differentiate(self, slab: Slab, dout: Tensor, states: States, dstates: States, parts: Parts) -> None:
        """Fills the slab's gradients, but for the scale of the queries'.

        States are as `retraced` has them, gradients of states are filled from the one after the slab.
        """

    def _decay(self, log_decay: Tensor | None) -> Any:
        grid, v = self.grid, self.problem.inputs.v
        if log_decay is not None and log_decay.dim() == 2:
            log_decay = log_decay.expand(v.shape[0], grid.length, -1, -1)  # read slab by slab, never in memory
        if log_decay is not None and log_decay.dim() > 1:
            kind = self.channel_decay if log_decay.dim() == 4 else self.token_decay
            return kind(self.block.of(log_decay, v.shape[2]), grid)
        constant = v.new_zeros(self.heads) if log_decay is None else log_decay[self.block.heads]
        return TokenDecay(constant.expand(grid.rows, grid.length, -1), grid, constant)

    def part(self, x: Tensor) -> Lanes:
        """The block's part of a tensor `[B, T, heads or groups, D]` or `[B, T, heads]`, of all tokens or steps."""
        own = self.block.of(x if x.dim() == 4 else x.unsqueeze(-1), self.problem.inputs.v.shape[2])
        return (Lanes if x.shape[1] == self.grid.length else LastSteps)(own, self.grid)

    def work(self, name: str, dim: int, slab: Slab) -> Tensor:
        """The workspace `name` for a slab, `[N, C, dim]`."""
        return self._work(name, dim, slab, False)

    def square(self, name: str, slab: Slab) -> Tensor:
        """The workspace `name` for scores between the tokens of each chunk, `[N, C, C]`; zero when first used."""
        return self._work(name, self.grid.chunk, slab, True)

    def _work(self, name: str, dim: int, slab: Slab, zero: bool) -> Tensor:
        key = name, slab.chunks
        if key not in self.works:
            whole = self.works.get((name, 0))
            if whole is None:
                whole = self.works[name, 0] = self.grid.workspace(dim, zero=zero)
            self.works[key] = whole[: slab.chunks].view(-1, self.grid.chunk, dim)
        return self.works[key]

    def by_chunk(self, name: str, dim: int, slab: Slab) -> tuple[Tensor, ...]:
        """The same workspace as `[lanes, C, dim]`, chunk by chunk."""
        key = name, slab.chunks
        if key not in self.cut:
            self.cut[key] = self.work(name, dim, slab).view(slab.chunks, -1, self.grid.chunk, dim).unbind(0)
        return self.cut[key]

    def new_states(self) -> States:
        return States(self.grid, self.key_dim, self.value_dim)

    def lanes(self, state: Tensor) -> Tensor:
        """The block's part of a state `[B, H, K, V]` as `[lanes, K, V]`."""
        return self.block.of_state(state).reshape(-1, *state.shape[2:])

    def put(self, state: Tensor, lanes: Tensor) -> None:
        part = self.block.of_state(state)
        part.copy_(lanes.view_as(part))

    def run(self, slabs: Iterable[Slab], states: States, out: Lanes) -> None:
        """Writes the outputs of slabs in order, given the state before them, which becomes that after them."""
        for slab in slabs:
            self.load(slab)
            self.advance(slab, states)
            self.read(slab, states, out.flat[slab.chunks])
            out.store(slab)
            states.at[0].copy_(states.at[slab.chunks])

    def retraced(self, state: Tensor) -> Iterator[tuple[Slab, States]]:
        """All slabs from the last to the first, given the state before the first, and of each its states.

        What `differentiate` takes of them is filled: here the one before the slab.
        """
        states = self.new_states()
        for slab, start in zip(reversed(self.grid.slabs()), reversed(self.slab_starts(state)), strict=True):
            states.at[0].copy_(start)
            yield slab, states

    def slab_starts(self, state: Tensor) -> list[Tensor]:
        """The states at the starts of all slabs."""
        slabs, states = self.grid.slabs(), self.new_states()
        starts = torch.empty(len(slabs), *state.shape, dtype=state.dtype, device=state.device)
        starts[0] = state
        for number, slab in enumerate(slabs[:-1]):
            states.at[0].copy_(starts[number])
            self.load(slab, reads=False)
            self.advance(slab, states)
            starts[number + 1] = states.at[slab.chunks]
        return list(starts)


def forward(
    sweep: type[Sweep], problem: Problem[Any], initial_state: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, written to `out` where it is passed; final state)."""
    out = problem.new_output() if out is None else out
    entering, final = problem.entering(initial_state), problem.new_states()
    for each in problem.once(sweep.over):
        states = each.new_states()
        states.at[0].copy_(each.lanes(entering))
        each.run(each.grid.slabs(), states, each.part(out))
        each.put(final, states.at[0])
    return out, final


def final_state(sweep: type[Sweep], problem: Problem[Any]) -> Tensor:
    """The state after each row's last token, from zero, without outputs."""
    final = problem.new_states()
    for each in problem.once(sweep.over):
        states = each.new_states()
        states.at[0].zero_()
        for slab in each.grid.slabs():
            each.load(slab, reads=False)
            each.advance(slab, states)
            states.at[0].copy_(states.at[slab.chunks])
        each.put(final, states.at[0])
    return final


def backward(
    sweep: type[Sweep],
    problem: Problem[Any],
    dout: Tensor,
    dfinal_state: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensors, Tensor]:
    """The gradients of the inputs, in their types, and of the initial state.

    That of a constant decay, which has no time, is a sum over all tokens, in float64: `constant` of each sweep.
    """
    types = [
        None if x is None else problem.gradient_type(x) if name in ("q", "k", "v") else x.dtype
        for name, x in zip(problem.inputs._fields, problem.inputs, strict=True)
    ]
    gradients = problem.op.record(*map(_new_gradient, problem.inputs, types))
    entering, dinitial = problem.entering(initial_state), problem.new_states()
    for each in problem.once(sweep.over):
        parts = {name: each.part(dx) for name, dx in gradients._asdict().items() if dx is not None and dx.dim() > 2}
        if gradients.log_decay is not None and "log_decay" not in parts:
            each.constant = gradients.log_decay[each.block.heads]
        douts, dstates = each.part(dout), each.new_states()
        if dfinal_state is not None:
            dstates.at[0].copy_(each.lanes(dfinal_state))
        for slab, states in each.retraced(each.lanes(entering)):
            dstates.at[slab.chunks].copy_(dstates.at[0])
            each.differentiate(slab, douts.load(slab), states, dstates, parts)
            for name, part in parts.items():
                part.store(slab, scale=problem.scale if name == "q" else 1.0)
        each.put(dinitial, dstates.at[0])
    found = tuple(dx if dx is None else dx.to(dtype) for dx, dtype in zip(gradients, types, strict=True))
    return found, problem.entering(dinitial)


def _new_gradient(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if x is None:
        return None
    return torch.empty_like(x, dtype=dtype) if x.dim() > 2 else torch.zeros_like(x, dtype=torch.float64)
