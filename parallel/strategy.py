"""Strategy: by which exchange each kind of op runs on a row that ranks share."""

from __future__ import annotations

from dataclasses import dataclass, replace

ATTENTION = ("ring", "gather", "ulysses")
RECURRENT = ("state_passing", "ulysses")


@dataclass(frozen=True)
class Strategy:
    """The strategies of softmax attention and of recurrent ops, and other ones for some layers.

    attention: "ring" passes keys and values round; "gather" brings them all together; "ulysses" exchanges tokens for
        heads, and is a ring among the ranks that hold the same heads where `Mesh.heads` has fewer ranks than the row.
    recurrent: "state_passing" gathers what spans do to the state; "ulysses" exchanges tokens for heads or channels.
    mixers: (name in the model's pattern, strategy) for layers that differ.

    Raises ValueError for an unknown strategy.
    """

    attention: str = "ring"
    recurrent: str = "state_passing"
    mixers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        every = tuple(dict.fromkeys(ATTENTION + RECURRENT))
        named = [(f"parallel.mixers.{name}", chosen, every) for name, chosen in self.mixers]
        for name, chosen, allowed in [
            ("parallel.attention", self.attention, ATTENTION),
            ("parallel.recurrent", self.recurrent, RECURRENT),
            *named,
        ]:
            if chosen not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {chosen!r}")

    def of(self, mixer: str) -> Strategy:
        """The strategy of layers of this name: a strategy that only one kind of op has changes that kind alone."""
        chosen = dict(self.mixers).get(mixer)
        if chosen is None:
            return self
        attention = chosen if chosen in ATTENTION else self.attention
        return replace(self, attention=attention, recurrent=chosen if chosen in RECURRENT else self.recurrent)
