"""Choices: the queries that choose blocks, and the windows and blocks of the rows they choose among."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks import BlockLayout
from ..derived import Deriving
from ..documents import Documents
from ..windows import WindowLayout
from .rule import Rule


@dataclass(frozen=True)
class Choices(Deriving):
    """What lists of blocks are chosen for, and among what.

    queries: any tokens of the rows. windows, layout: of the whole rows, by which summaries and lists are numbered.
    """

    queries: Documents
    windows: WindowLayout
    layout: BlockLayout

    @classmethod
    def of(cls, queries: Documents, rows: Documents, rule: Rule) -> Choices:
        """Those that a rule gives to queries of the rows."""
        windows = rows.derive(WindowLayout, rule.span, rule.step)
        return cls(queries, windows, rows.derive(BlockLayout, rule.block_size))
