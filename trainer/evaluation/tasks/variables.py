"""Variable tracking."""

from __future__ import annotations

from dataclasses import dataclass

from .drawing import Draw
from .task import Material, check_range
from .text import Draft, Hidden, Said, TextTask, beginning, check_haystack

NAME = 4  # letters
NAMES = 26**NAME


@dataclass(frozen=True)
class VariableTracking(TextTask):
    """Chains of assignments, X = 12345, Y = X, …, anywhere in the text; which variables have the first one's value?

    They are asked for in the order in which they got it.
    """

    name = "variables"
    paper = "RULER, Hsieh et al., 2024, arXiv 2404.06654"

    hops: int = 4  # assignments of one variable to another
    chains: int = 1
    haystack: str = "noise"  # or documents: held-out ones

    @property
    def answers(self) -> int:
        return self.hops + 1

    @property
    def filled_with(self) -> str:
        return self.haystack

    def check(self, material: Material) -> None:
        check_haystack(self.haystack)
        check_range("hops", self.hops, 1)
        check_range("chains", self.chains, 1)

    def draft(self, material: Material, number: int) -> Draft:
        draw, encode, each = self.draw(material, number), material.encode, self.hops + 1
        names = [_name(name) for name in draw.distinct(NAMES, self.chains * each)]
        values = [str(10000 + value) for value in draw.distinct(90000, self.chains)]
        depths = _sorted_by_chain(draw, self.chains, each)
        hidden = list[Hidden]()
        for chain, value in enumerate(values):
            own = names[chain * each : (chain + 1) * each]
            sources = [f" {value}", *(f" {name}" for name in own)]
            for place, (name, source) in enumerate(zip(own, sources[:each], strict=True)):
                said = [*encode("\nVAR"), *encode(f" {name}"), *encode(" ="), *encode(source), *encode("\n")]
                hidden.append(Hidden(said, depths[chain][place]))
        ending = [
            Said(
                encode(
                    f"\nWhich variables have the value {values[0]}, as it was assigned or passed on? In the order in "
                    "which they got it:"
                )
            )
        ]
        for place, name in enumerate(names[:each]):
            ending += [Said(encode(","))] if place else []
            ending.append(Said(encode(f" {name}"), place))
        instruction = "Follow the variables that are assigned in the text below.\n"
        return Draft(beginning(material, instruction), hidden, ending)


def _sorted_by_chain(draw: Draw, chains: int, each: int) -> list[list[float]]:
    """Depths anywhere alike, dealt to the chains, in each in their order."""
    drawn, dealt = draw.fractions(chains * each), draw.permutation(chains * each)
    return [sorted(drawn[dealt[chain * each : (chain + 1) * each]].tolist()) for chain in range(chains)]


def _name(number: int) -> str:
    return "".join(chr(ord("A") + number // 26**place % 26) for place in range(NAME))
