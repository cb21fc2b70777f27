"""A call of the delta rule cut into blocks of rows and heads, each swept slab by slab; see `chunked.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks.slabs import Block, Borders, Grid, Lanes, Masks, Slab, States, blocks
from ..documents import Documents
from ..recurrence import Inputs
from .decay import ChannelScores, TokenScores
from .rules import BetaRule, EraseRule

# Half of what gated linear attention takes: a solve and twice the scores grow with the chunk's length.
CHUNK = 32
MATRICES = 64  # chunks times lanes in a slab
NAMES = ("q", "k", "v", "beta", "log_decay", "a", "b")


@dataclass(frozen=True)
class ShortGrid(Grid):
    """A grid of short chunks, more of them in a slab."""

    longest_chunk: int = CHUNK

    @property
    def chunks(self) -> int:
        return min(max(1, MATRICES // self.lanes), -(-self.length // self.chunk))


@dataclass(frozen=True)
class Problem:
    """A whole call: its inputs, and how its blocks are cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    a: Tensor | None
    b: Tensor | None
    documents: Documents
    scale: float

    @property
    def inputs(self) -> Inputs:
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    def new_states(self) -> Tensor:
        batch, _, heads, values = self.v.shape
        return torch.zeros(batch, heads, self.k.shape[-1], values, dtype=self.dtype, device=self.q.device)

    def entering(self, state: Tensor | None) -> Tensor:
        """The state that enters each row: zero where a row does not continue a document."""
        if state is None:
            return self.new_states()
        if all(self.documents.continues):
            return state.to(self.dtype)
        keep = torch.tensor(self.documents.continues, device=state.device)[:, None, None, None]
        return torch.where(keep, state.to(self.dtype), 0.0)

    @property
    def reach(self) -> int:
        """The tokens up to which an entering state reaches in some row."""
        rows = zip(self.documents.runs, self.documents.continues, strict=True)
        return max((row[0].stop for row, continues in rows if continues), default=0)

    def of_keys(self) -> Tensor:
        """An empty `[B, T, H, K]` of what is computed in."""
        shape = *self.v.shape[:3], self.k.shape[-1]
        return torch.empty(shape, dtype=self.dtype, device=self.q.device)

    def sweeps(self) -> list[Sweep]:
        grouped = [x for x in (self.q, self.k, self.a, self.b) if x is not None]
        repeats = math.lcm(*(self.heads // x.shape[2] for x in grouped))
        return [Sweep(self, block) for block in blocks(self.v.shape[0], self.heads, self.heads // repeats)]


class Sweep:
    """One block of rows and heads: its grid of slabs, its parts of tensors, its workspaces.

    `further` columns of zeros are appended to the values, for states that carry more than what the values write.
    """

    def __init__(self, problem: Problem, block: Block, further: int = 0) -> None:
        self.problem, self.block = problem, block
        rows, length, heads, values = problem.v[block.rows, :, block.heads].shape
        self.key_dim, self.value_dim = problem.k.shape[-1], values + further
        log_decay = problem.log_decay
        per_channel = log_decay is not None and log_decay.dim() == 4
        self.grid = ShortGrid(rows, heads, length, problem.dtype, problem.q.device)
        self.borders = Borders(problem.documents.rows(block.rows.start, block.rows.stop), self.grid)
        self.masks: Masks | None = None
        self.works: dict[tuple[str, int], Tensor] = {}
        self.cut: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        if log_decay is None:
            still = problem.v.new_zeros(heads)
            self.decay = TokenScores(still.expand(rows, length, -1), self.grid, still)
        else:
            kind = ChannelScores if per_channel else TokenScores
            self.decay = kind(block.of(log_decay, problem.heads), self.grid)
        self.sources = {
            name: self.part(x)
            for name, x in zip(NAMES, problem.inputs, strict=True)
            if x is not None and name != "log_decay"
        }
        self.rule = BetaRule(self) if problem.a is None else EraseRule(self)

    def part(self, x: Tensor) -> Lanes:
        """The block's part of a tensor `[B, T, heads or groups, D]` or `[B, T, heads]`."""
        return Lanes(self.block.of(x if x.dim() == 4 else x.unsqueeze(-1), self.problem.heads), self.grid)

    def work(self, name: str, dim: int, slab: Slab) -> Tensor:
        """The workspace `name` for a slab, `[N, C, dim]`; zero when first used."""
        key = name, slab.chunks
        if key not in self.works:
            whole = self.works.get((name, 0))
            if whole is None:
                whole = self.works[name, 0] = self.grid.workspace(dim)
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

    def load(self, slab: Slab, *, reads: bool = True) -> None:
        """Fills the workspaces: the system (I + L), R, Ê, B̂, and with `reads` the queries, their scores and factors."""
        keys, size = self.key_dim, self.grid.chunk
        self.masks = self.borders.masks(slab)
        self.decay.load(slab, self.masks)
        self.rule.load(slab)
        if reads:
            q = self.sources["q"].load(slab)
            if self.problem.scale != 1.0:
                q.mul_(self.problem.scale)
            torch.mul(q, self.decay.enter, out=self.work("query", keys, slab))
            self.decay.scores(q, self.rule.columns, self.work("scores", size, slab))
            self.rule.load_reads(slab, q)

    def advance(self, slab: Slab, states: States) -> None:
        """Fills Z and the states after each chunk, from the one before the first."""
        keys, values, size = self.key_dim, self.value_dim, self.grid.chunk
        system, erase = self.by_chunk("system", size, slab), self.by_chunk("erase", keys, slab)
        right, z = self.by_chunk("right", values, slab), self.by_chunk("z", values, slab)
        write = self.by_chunk("write", keys, slab)
        self.rule.write(slab, states)
        for n in range(slab.chunks):
            before, after = states.at[n], states.at[n + 1]
            right[n].baddbmm_(erase[n], before, alpha=-1.0)
            torch.linalg.solve_triangular(system[n], right[n], upper=False, unitriangular=True, out=z[n])
            self.rule.carry(before, self.decay.through[n], after).baddbmm_(write[n].mT, z[n])

    def read(self, slab: Slab, states: States, out: Tensor) -> None:
        """Writes the outputs of the slab's tokens to `out` `[N, C, V]`."""
        z = self.work("z", self.value_dim, slab)
        torch.bmm(self.work("scores", self.grid.chunk, slab), z, out=out)
        out.baddbmm_(self.work("query", self.key_dim, slab), states.before[slab.chunks])
        self.rule.read(slab, out)

    def retreat(self, slab: Slab, dstates: States, dout: Tensor) -> None:
        """Fills dR and the gradients of the states before each chunk, from that of the one after the last."""
        keys, values, size = self.key_dim, self.value_dim, self.grid.chunk
        torch.bmm(self.work("scores", size, slab).mT, dout, out=self.work("dz", values, slab))
        torch.bmm(self.work("query", keys, slab).mT, dout, out=dstates.before[slab.chunks])
        system, erase = self.by_chunk("system", size, slab), self.by_chunk("erase", keys, slab)
        dright, dz = self.by_chunk("dright", values, slab), self.by_chunk("dz", values, slab)
        write = self.by_chunk("write", keys, slab)
        for n in reversed(range(slab.chunks)):
            before, after = dstates.at[n], dstates.at[n + 1]
            dz[n].baddbmm_(write[n], after)
            torch.linalg.solve_triangular(system[n].mT, dz[n], upper=True, unitriangular=True, out=dright[n])
            before.addcmul_(after, self.decay.through[n]).baddbmm_(erase[n].mT, dright[n], alpha=-1.0)

    def gradient_parts(self, gradients: tuple[Tensor | None, ...]) -> dict[str, Lanes]:
        """Where the gradients of the inputs go."""
        return {name: self.part(x) for name, x in zip(NAMES, gradients, strict=True) if x is not None}

    def differentiate(self, slab: Slab, states: States, dstates: States, dout: Tensor, parts: dict[str, Lanes]) -> None:
        """Fills the slab's gradients of the inputs, once `advance` and `retreat` have been through it."""
        n, keys, values, size = slab.chunks, self.key_dim, self.value_dim, self.grid.chunk
        q, z, dright = self.sources["q"].flat[n], self.work("z", values, slab), self.work("dright", values, slab)
        dq, drows, dcolumns = parts["q"].flat[n], self.work("drows", keys, slab), self.rule.dcolumns(slab, parts)
        torch.bmm(dout, states.before[n].mT, out=dq).mul_(self.decay.enter)
        torch.baddbmm(drows, dright, states.before[n].mT, beta=0.0, alpha=-1.0, out=drows).mul_(self.rule.enter)
        torch.bmm(z, dstates.after[n].mT, out=dcolumns).mul_(self.decay.leave)

        dscores = self.work("dscores", size, slab)
        self.decay.add_gradients(torch.bmm(dout, z.mT, out=dscores), q, self.rule.columns, dq, dcolumns)
        torch.baddbmm(dscores, dright, z.mT, beta=0.0, alpha=-1.0, out=dscores)
        self.rule.add_system_gradient(slab, dscores, drows, self.rule.columns, dcolumns)
        moments = self.work("moments", keys, slab) if "log_decay" in parts else None
        self.rule.differentiate(slab, dout, dright, drows, dstates, parts, moments)
        if moments is not None:
            moments.addcmul_(q, dq)
            ends = torch.linalg.vecdot(states.after[n], dstates.after[n])
            parts["log_decay"].flat[n].copy_(self.decay.gradient(moments, ends))
        if self.problem.scale != 1.0:
            dq.mul_(self.problem.scale)
