"""Settings of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..requirements import at_least, one_of

KINDS = ("adamw", "muon", "lion")
ADAM_EPS = 1e-8
MOMENTUM = 0.95


@dataclass(frozen=True)
class Rule:
    """What differs for the parameters whose names match: see docs/optimizers.md.

    match: patterns of names, in which * stands for anything. learning_rate_factor: by which the learning rate is
    multiplied. weight_decay: in place of `optimizer.weight_decay`, of norms and biases too; None leaves it as it is.
    row_blocks: Muon takes each matrix as so many, one below the other: one per head, for instance.
    """

    match: tuple[str, ...]
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
    row_blocks: int = 1


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101); norms, biases and other 1-D parameters do not decay.

    Or Muon (Jordan et al., 2024) for the matrices of hidden layers with AdamW for the rest, or Lion (Chen et al., 2023,
    arXiv 2302.06675).
    """

    kind: str = "adamw"  # or muon, lion; optimizer= chooses it with its defaults
    learning_rate: float = 3e-4  # at its peak; the schedule does the rest
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments; lion: of the step's mean and of the state
    eps: float = ADAM_EPS  # added to the root of the second moment
    weight_decay: float = 0.1  # of matrices and embeddings
    momentum: float | None = None  # muon: decay of the mean gradient of matrices; null: 0.95
    qk_clip: float | None = None  # the largest logit that attention heads keep: queries shrink beyond it; null: any
    groups: dict[str, Any] = field(default_factory=dict)  # rules for parameters by their names: docs/optimizers.md
    only: list[str] = field(default_factory=list)  # layers or parameters that train, by their names; empty: all do

    def check(self) -> None:
        """Raises ValueError for what cannot be; the schedule checks the learning rate."""
        one_of("optimizer.kind", self.kind, KINDS)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1); got {list(self.betas)}")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps must be positive; got {self.eps}")
        if self.kind == "lion" and self.eps != ADAM_EPS:
            raise ValueError(f"optimizer.eps must not be given with optimizer=lion; got {self.eps}. Leave it out")
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.momentum is not None and self.kind != "muon":
            raise ValueError(f"optimizer.momentum must come with optimizer=muon; got {self.momentum} with {self.kind}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"optimizer.momentum must lie in [0, 1); got {self.momentum}")
        if self.qk_clip is not None and not 0 < self.qk_clip < math.inf:
            raise ValueError(f"optimizer.qk_clip must be positive; got {self.qk_clip}. 100 is usual, null for none")
        for name, rule in self.groups.items():
            if rule is not None:
                self._check_rule(name)

    @property
    def decay(self) -> float:
        """Muon's momentum."""
        return MOMENTUM if self.momentum is None else self.momentum

    @property
    def rules(self) -> dict[str, Rule]:
        """`groups`, by name, without those that null takes out."""
        given = {name: rule for name, rule in self.groups.items() if rule is not None}
        return {name: Rule(**{**rule, "match": tuple(rule["match"])}) for name, rule in given.items()}

    def _check_rule(self, name: str) -> None:
        setting, rule = f"optimizer.groups.{name}", self.groups[name]
        known = [each.name for each in fields(Rule)]
        if not isinstance(rule, dict) or not set(rule) <= set(known):
            got = list(rule) if isinstance(rule, dict) else rule
            raise ValueError(f"{setting} must hold settings of {', '.join(known)}; got {got}")
        match = rule.get("match")
        if not isinstance(match, list | tuple) or not match or not all(isinstance(each, str) for each in match):
            raise ValueError(f"{setting}.match must list patterns of names; got {match}. Write ['*.query.weight']")
        for key in ("learning_rate_factor", "weight_decay"):
            value = rule.get(key)
            if value is not None and not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"{setting}.{key} must be a number of at least 0; got {value!r}")
        blocks = rule.get("row_blocks", 1)
        if not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"{setting}.row_blocks must be a whole number of at least 1; got {blocks!r}")
        if blocks > 1 and self.kind != "muon":
            raise ValueError(f"{setting}.row_blocks must come with optimizer=muon; got {blocks} with {self.kind}")
        if len(rule) == 1:
            raise ValueError(f"{setting} must change something besides match; got nothing. Leave it out")
