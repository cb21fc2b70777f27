"""Question answering: one text that has the answer, among others that have not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .task import Material, Problem, Question
from .text import Draft, Hidden, Said, TextTask, beginning

FIELDS = ("context", "question", "answer")


@dataclass(frozen=True)
class QuestionAnswering(TextTask):
    """A question of the user's file about one of its texts, which stands anywhere among the file's other texts.

    Problem n asks question n of the file, from the start again after the last one. Texts come over again where they do
    not fill the problem, and the last one is cut.
    """

    name = "question_answering"
    paper = "RULER, Hsieh et al., 2024, arXiv 2404.06654"
    reads = "questions"

    def check(self, material: Material) -> None:
        if len({question.context for question in material.questions}) < 2:
            raise ValueError(
                f"questions must be about at least two texts, which distract from one another; got "
                f"{len(material.questions)} question(s) about one. Add lines with other contexts"
            )

    def draft(self, material: Material, number: int) -> Draft:
        asked, encode = material.questions[number % len(material.questions)], material.encode
        ending = [Said(encode(f"\nQuestion: {asked.question}\nAnswer:")), Said(encode(f" {asked.answer}"), 0)]
        instruction = "Answer the question at the end from the documents below.\n"
        return Draft(beginning(material, instruction), [Hidden(self._document(material, asked.context))], ending)

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        draft, draw = self.draft(material, number), self.draw(material, number)
        own = material.questions[number % len(material.questions)].context
        others = [text for text in dict.fromkeys(each.context for each in material.questions) if text != own]
        room, borders, filler = length - draft.size, [0], list[int]()
        while len(filler) < room:
            for place in draw.permutation(len(others)):
                filler += self._document(material, others[place])
                borders.append(min(len(filler), room))
                if len(filler) >= room:
                    break
        hidden = borders[draw.one(len(borders))] / room if room else 0.0
        return draft.around(np.array(filler[:room], np.int64), hidden)

    @staticmethod
    def _document(material: Material, context: str) -> list[int]:
        return material.encode(f"\nDocument: {context}\n")


def read_questions(path: str, setting: str) -> tuple[Question, ...]:
    """The questions of a file with a JSON object in each line. Raises ValueError for one that cannot be read."""
    made = list[Question]()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{setting} must be a JSON Lines file that can be read; got {path}: {reason}. Check the path"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{setting} must have a JSON object in each line; got {path}:{number}: {error}") from None
        given = [record.get(name) if isinstance(record, dict) else None for name in FIELDS]
        if not all(isinstance(value, str) and value.strip() for value in given):
            raise ValueError(
                f"{setting} must give {', '.join(FIELDS)} as texts in each line; got {path}:{number} without. Add them"
            )
        made.append(Question(*(str(value).strip() for value in given)))
    if not made:
        raise ValueError(f"{setting} must have at least one question; got {path}, which has none. Add lines")
    return tuple(made)
