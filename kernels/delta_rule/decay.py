"""Decay between the tokens of a chunk, for scores of several pairs of rows and columns under the same decays."""

from __future__ import annotations

from torch import Tensor

from ..chunks.channel import ChannelDecay
from ..chunks.decay import TokenDecay
from ..chunks.slabs import Grid


class TokenScores(TokenDecay):
    """One decay a token and head."""

    def add_gradients(self, dscores: Tensor, rows: Tensor, columns: Tensor, drows: Tensor, dcolumns: Tensor) -> None:
        """Adds the gradients of what `scores(rows, columns)` was given; `dscores` is changed."""
        self._decay(dscores)
        drows.baddbmm_(dscores, columns)
        dcolumns.baddbmm_(dscores.mT, rows)


class ChannelScores(ChannelDecay):
    """One decay a token, head and key channel."""

    def __init__(self, log_decay: Tensor, grid: Grid) -> None:
        super().__init__(log_decay, grid)
        self.spare = tuple(grid.workspace(log_decay.shape[-1]).flatten(0, 2) for _ in range(2))

    def add_gradients(self, dscores: Tensor, rows: Tensor, columns: Tensor, drows: Tensor, dcolumns: Tensor) -> None:
        """Adds the gradients of what `scores(rows, columns)` was given; `dscores` is changed."""
        for reach in self.reaches:  # what another pair may have been written over
            self._about(rows, columns, reach)
        own_rows, own_columns = (spare[: len(rows)] for spare in self.spare)
        self.scores_backward(dscores, rows, columns, own_rows, own_columns)
        drows.add_(own_rows)
        dcolumns.add_(own_columns)
