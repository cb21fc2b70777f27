"""The settings of evaluation: validation on held-out rows, its comparisons, and the sample of text."""

from __future__ import annotations

from dataclasses import dataclass

from ..requirements import at_least


@dataclass
class EvaluationSettings:
    """Validation on held-out documents, and a sample of text."""

    every: int = 100  # steps; 0 = never
    at_start: bool = False  # validate before the first step too, as step 0: what `init_from` begins with
    rows: int | None = 16  # held-out rows; null = all of them
    positions: bool = False  # also the loss by position in the document, in buckets 0..15, 16..31, … up to a whole row
    context: int | None = None  # at the end, also score held-out tokens from their last so many tokens alone
    context_rows: int = 8  # held-out rows that this is done on; costs `context` times as much as with whole rows
    baselines: bool = False  # at the end, also count unigrams and bigrams of the training text; recall: chance
    prompt: str = ""  # the sample begins with it; empty: with the start of a document
    sample_tokens: int = 128  # length of the sample; 0 = none, as with data=recall, which has no text
    temperature: float = 0.8  # of the sample; 0 = the likeliest token

    def check(self, source: str) -> None:
        """Raises ValueError for what cannot be, or has no effect on data of this source."""
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.rows", self.rows, 1)
        if self.positions and not (self.every or self.at_start):
            raise ValueError(
                "evaluation.positions must be false with evaluation.every=0, which validates nothing; got true. "
                "Set one of the two"
            )
        at_least("evaluation.context", self.context, 1)
        at_least("evaluation.context_rows", self.context_rows, 1)
        at_least("evaluation.sample_tokens", self.sample_tokens, 0)
        if source == "recall" and self.prompt:
            raise ValueError(
                f"evaluation.prompt must be left out with data=recall, which has no text; got {self.prompt!r}"
            )
        at_least("evaluation.temperature", self.temperature, 0)
