"""Problems of the tasks: exact to the token with every kind of tokenizer, and solved by naive readers of their text."""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from longreach.trainer.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.evaluation.suite import Suite, SuiteSettings, open_suite
from longreach.trainer.evaluation.tasks.catalogue import TASKS, tasks_of
from longreach.trainer.evaluation.tasks.question_answering import read_questions
from longreach.trainer.evaluation.tasks.task import NOISE, Material, Problem, Question, Task

QUESTIONS = tuple(
    Question(f"The town of T{n} lies on the river R{7 * n}. {'It is old. ' * n}", f"Where lies T{n}?", f"on R{7 * n}")
    for n in range(5)
)
WRITTEN = [NOISE + " The special number for it is 1234567. Which variables come most often in the list? A pass key."]


def with_words() -> Tokenizer:
    """A tokenizer as Llama's: every piece of text begins with a blank, and BOS begins a document."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=["\n", *map(chr, range(32, 127))],
        show_progress=False,
    )
    library.train_from_iterator(WRITTEN * 5, trainer)
    begin = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return Tokenizer(library, library.token_to_id("</s>"), {})


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe([WRITTEN * 20], 420),
    "words": with_words(),
}


def material(name: str = "bytes", seed: int = 0) -> Material:
    tokenizer = TOKENIZERS[name]
    return Material(tokenizer.vocabulary_size, seed, tokenizer, np.arange(300, dtype=np.int64) % 250, QUESTIONS)


def task(name: str, **given: Any) -> Task:
    (chosen,) = tasks_of([{"task": name, **given}], "tasks")
    return chosen.task


SMALL: dict[str, dict[str, Any]] = {"common_words": {"frequency": 8, "others": 2, "words": 4}}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TASKS)
def test_problems_have_exactly_the_tokens_that_are_asked_for(name: str, tokenizer: str) -> None:
    of, chosen = material(tokenizer), task(name, **SMALL.get(name, {}))
    chosen.check(of)
    for number in range(3):
        least = chosen.least(of, number)
        for length in (least, least + 1, least + 50, least + 733):
            tokens, targets, answers, others = chosen.problem(of, length, number, 0.4)
            assert len(tokens) == len(targets) == len(answers) == length
            assert 0 <= tokens.min() <= tokens.max() < of.vocabulary
            asked = np.flatnonzero(targets >= 0)
            np.testing.assert_array_equal(targets[asked], tokens[asked + 1])
            np.testing.assert_array_equal(asked, np.flatnonzero(answers >= 0))
            assert sorted(set(answers[asked])) == list(range(chosen.answers))
            assert len(others) == max(chosen.choices - 1, 0)
            assert all(len(other) == len(asked) and list(targets[asked]) != list(other) for other in others)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ["passkey", "needle"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_needles_sit_at_their_depth_to_the_token(name: str, depth: float, tokenizer: str) -> None:
    of, chosen = material(tokenizer), task(name)
    draft: Any = chosen.draft(of, 5)  # type: ignore[attr-defined]
    needle, before = draft.hidden[0].ids, len(draft.before)
    tokens = chosen.problem(of, 700, 5, depth).tokens.tolist()
    (place,) = [at for at in range(700) if tokens[at : at + len(needle)] == needle]
    hay = tokens[before:place] + tokens[place + len(needle) : 700 - sum(len(said.ids) for said in draft.ending)]
    assert hay == np.resize(of.noise, len(hay)).tolist()
    assert place - before == round(depth * len(hay))


def cut(problem: Problem, tokenizer: Tokenizer) -> tuple[str, list[str], str]:
    """What comes before the first answer, the answers, and all of it, as text."""
    first = int(np.flatnonzero(problem.targets >= 0)[0]) + 1
    numbers = range(problem.answers.max() + 1)
    said = [tokenizer.decode(problem.targets[problem.answers == number]).strip() for number in numbers]
    return tokenizer.decode(problem.tokens[:first]), said, tokenizer.decode(problem.tokens)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ["passkey", "needle", "needle_multikey", "needle_multivalue", "needle_multiquery"])
def test_needles_are_found_by_reading(name: str, tokenizer: str) -> None:
    for number in range(4):
        problem = task(name).problem(material(tokenizer), 1100, number, 0.3)
        before, answers, whole = cut(problem, TOKENIZERS[tokenizer])
        text, _, asked = re.sub(r"\s+", " ", whole).partition(" What ")
        if name == "passkey":
            (key,) = set(re.findall(r"The pass key is (\d{5}) ?\.", text))
            assert answers == [key]
            assert before.endswith("The pass key is")
            continue
        said = re.findall(r"special number for (\w+) is: (\d{7}) ?\.", text)
        words = re.findall(r"special number for (\w+) is:", asked)
        assert answers == [value for word in words for key, value in said if key == word]
        assert len(words) == (4 if name == "needle_multiquery" else 1)
        assert len(set(words)) == len(words)
        assert len(said) == (1 if name == "needle" else 4)
        assert not set(answers) & set(re.findall(r"\d{7}", before.partition("What ")[2]))


def test_the_choices_of_several_keys_are_what_the_text_says_of_the_others() -> None:
    problem = task("needle_multikey").problem(material(), 700, 0)
    _, (answer,), whole = cut(problem, TOKENIZERS["bytes"])
    others = {TOKENIZERS["bytes"].decode(other).strip() for other in problem.others}
    assert others | {answer} == set(re.findall(r"is: (\d{7})\.", whole))
    tokens, targets = problem.choice(2)
    assert targets[targets >= 0].tolist() == problem.others[1] == tokens[problem.targets.argmax() - 6 :][-8:].tolist()
    assert problem.choice(0)[0] is problem.tokens
    fewer, none = (task("needle_multikey", candidates=n).problem(material(), 700, 0) for n in (2, 0))
    assert (fewer.others, none.others) == (problem.others[:1], ())


@pytest.mark.parametrize("chains", [1, 3])
def test_variables_are_followed_by_reading(chains: int) -> None:
    for number in range(4):
        problem = task("variables", hops=3, chains=chains).problem(material("bpe"), 800, number)
        before, answers, _ = cut(problem, TOKENIZERS["bpe"])
        text, _, question = before.rpartition("Which variables")
        value = re.findall(r"\d{5}", question)[0]
        having, order = {}, []
        for name, source in re.findall(r"VAR ([A-Z]{4}) = (\w+)\n", text):
            having[name] = having.get(source, source)
            order += [name] if having[name] == value else []
        assert answers == order
        assert len(order) == 4
        assert len(having) == 4 * chains


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_words_are_counted_by_reading(tokenizer: str) -> None:
    for number in range(3):
        problem = task("common_words", **SMALL["common_words"]).problem(material(tokenizer), 900, number)
        before, answers, _ = cut(problem, TOKENIZERS[tokenizer])
        words = re.findall(r" ([a-z]{6})(?= |$)", before.partition("\n")[2].rpartition("\n")[0])
        counts = {word: words.count(word) for word in dict.fromkeys(words) if word not in NOISE}
        assert answers == [word for word, count in counts.items() if count == 8]
        assert {count for word, count in counts.items() if word not in answers} == {2}
        problem = task("frequent_words").problem(material(tokenizer), 900, number)
        before, answers, _ = cut(problem, TOKENIZERS[tokenizer])
        words = re.findall(r" ([a-z]{6})(?= |$)", before.partition("\n")[2].rpartition("\n")[0])
        counts = {word: words.count(word) for word in words}
        ordered = sorted(counts, key=lambda word: -counts[word])
        assert answers == ordered[:3]
        assert counts[ordered[0]] > counts[ordered[1]] > counts[ordered[2]] > counts[ordered[3]]
        assert counts[ordered[0]] == pytest.approx(4 * counts[ordered[1]], rel=0.3)  # n^-2


def test_a_question_is_answered_by_one_of_the_documents() -> None:
    places = set()
    for number in range(10):
        before, (answer,), _ = cut(task("question_answering").problem(material(), 900, number), TOKENIZERS["bytes"])
        asked = QUESTIONS[number % 5]
        text, _, question = before.rpartition("\nQuestion: ")
        assert question == f"{asked.question}\nAnswer:"
        assert answer == asked.answer
        assert text.count(asked.context) == 1
        assert sum(each.context in text for each in QUESTIONS) >= 3
        places.add(text.index(asked.context))
    assert len(places) > 5


def test_documents_hide_needles_from_a_drawn_place_on() -> None:
    of, chosen = material(), task("needle", haystack="documents")
    draft: Any = chosen.draft(of, 3)  # type: ignore[attr-defined]
    begun = len(draft.before)
    tokens = chosen.problem(of, 900, 3, 1.0).tokens[begun:]
    hay = tokens[: 900 - draft.size]
    assert of.text is not None
    np.testing.assert_array_equal(
        hay[1:], of.text[(np.flatnonzero(of.text == hay[0])[0] + np.arange(1, len(hay))) % 300]
    )


def test_tasks_of_ids_are_what_they_say() -> None:
    of = Material(130, 3)
    elements = list(permutations(range(5)))
    odd = 0
    for number in range(8):
        tokens, targets, _, _ = task("copying", tokens=5, kinds=7).problem(of, 40, number)
        copied = [token for token in tokens[:34] if token]
        assert tokens[34:].tolist() == [1, *copied]
        assert targets.tolist() == [-100] * 34 + copied + [-100]
        assert all(2 <= token < 9 for token in copied)

        for depth, place in ((0.0, 0), (0.5, 18), (1.0, 36)):
            tokens = task("induction").problem(of, 40, number, depth).tokens.tolist()
            assert tokens[place] == tokens[38] == 1
            assert tokens[place + 1] == tokens[39] >= 2
            assert tokens.count(1) == 2

        tokens, _, _, ((wrong,),) = task("parity").problem(of, 30, number)
        assert tokens[29] == sum(tokens[:28]) % 2 == 1 - wrong
        assert tokens[28] == 2
        odd += tokens[29]

        tokens = task("permutations").problem(of, 30 + number, number).tokens.tolist()
        things = list(range(5))
        for step in tokens[:-2]:
            things = [elements[step][thing] for thing in things]
        assert elements[tokens[-1]] == tuple(things)
    assert 0 < odd < 8


def test_problems_depend_on_seed_task_and_number_alone() -> None:
    drawn = {
        (seed, number): tuple(task("needle").problem(material(seed=seed), 400, number).tokens)
        for seed in (0, 1)
        for number in (0, 1, 2**40)
    }
    assert len(set(drawn.values())) == 6
    # The needle is the same at every length and depth, so that these are compared with equal problems.
    at = [cut(task("needle").problem(material(), length, 7, depth), TOKENIZERS["bytes"])[1] for length, depth in
          ((300, 0.0), (900, 0.7))]  # fmt: skip
    assert at[0] == at[1]
    # Pinned: numbers of two versions are to be compared.
    assert task("induction").problem(Material(30), 12, 7, 0.5).tokens.tolist() == PINNED["induction"]
    assert at[0] == PINNED["needle"]


PINNED: dict[str, Any] = {"induction": [3, 19, 29, 27, 1, 13, 2, 18, 7, 9, 1, 13], "needle": ["1586690"]}


def suite(tasks: list[Any], model: Material | None = None, **given: Any) -> Suite:
    of = material() if model is None else model
    return open_suite(SuiteSettings(tasks, **given), 512, of.vocabulary, of.tokenizer)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: suite(["nedle"]), r"tasks\[0\] must name a task; got 'nedle'. Did you mean needle\?"),
        (lambda: suite([{"keys": 4}]), r"tasks\[0\] must name a task; got None. Known: mqar, copying"),
        (lambda: suite([{"task": "needle", "key": 4}]), r"tasks\[0\]\.key must be a setting of needle; got .* keys"),
        (lambda: suite([{"task": "needle", "keys": "4"}]), r"tasks\[0\]\.keys must be of type int; got '4'"),
        (lambda: suite(["needle", "needle"]), "tasks must name each task once; got needle twice"),
        (
            lambda: suite([{"task": "needle", "queries": 2}]),
            r"tasks \(needle_queries_2\): queries must lie within 1..1",
        ),
        (lambda: suite([{"task": "needle", "candidates": 1}]), "candidates must be 0, for no choice, or at least 2"),
        (lambda: suite([{"task": "needle", "haystack": "hay"}]), "haystack must be one of noise, documents; got 'hay'"),
        (lambda: suite(["needle"], lengths=[100]), r"lengths must be at least 2\d\d for needle; got 100. Raise it"),
        (lambda: suite(["mqar"], lengths=[512, 63]), "lengths must be at least 64 for mqar; got 63"),
        (lambda: suite(["passkey"], Material(500)), r"tasks \(passkey\): its model must have a tokenizer"),
        (lambda: suite(["permutations"], Material(100)), "vocabulary must be at least 121, the permutations of five"),
        (lambda: suite(["mqar"], Material(30)), "vocabulary must be at least 34, half of it for 16 keys and a blank"),
        (lambda: suite(["question_answering"]), "questions must be a file for question_answering; got none"),
        (
            lambda: suite(["mqar"], questions="q.jsonl"),
            "questions must be left out without the task question_answering",
        ),
        (lambda: suite(["mqar"], depths=[0.5]), r"depths must be left out of tasks without one; got \[0.5\]"),
        (lambda: suite(["needle"], depths=[1.5]), r"depths must lie within 0\.\.1; got 1\.5"),
        (lambda: suite(["needle"], lengths=[512, 512]), "lengths must not repeat a value"),
        (lambda: suite(["needle"], problems=0), "problems must be at least 1; got 0"),
        (lambda: SuiteSettings([], problems=3), "problems must be left out without tasks; got 3"),
        (lambda: EvaluationSettings(tasks=["needle"], every=0).check("text"), r"evaluation\.tasks .*\.every=0"),
        (lambda: EvaluationSettings(tasks=["needle"]).check("recall"), r"evaluation\.tasks must be tasks of ids"),
        (lambda: EvaluationSettings(lengths=[64]).check("text"), r"evaluation\.lengths must be left out without"),
        (
            lambda: EvaluationSettings(task_seed=1).check("text"),
            r"evaluation\.task_seed must .* with evaluation\.tasks",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_setting(refused: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


def test_questions_are_read_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps(each._asdict()) for each in QUESTIONS]
    file.write_text("\n".join([*lines, ""]))
    assert [each.question for each in read_questions(str(file), "questions")] == [each.question for each in QUESTIONS]
    one = open_suite(SuiteSettings(["question_answering"], questions=str(file)), 900, 257, TOKENIZERS["bytes"])
    assert one.lengths == (900,)
    for text, message in (
        ("", "must have at least one question"),
        ("{", "must have a JSON object in each line; got .*:1"),
        ('\n{"context": "a", "question": "b"}', "must give context, question, answer as texts in each line; got .*:2"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"questions {message}"):
            read_questions(str(file), "questions")
    with pytest.raises(ValueError, match="questions must be a JSON Lines file that can be read"):
        read_questions(str(tmp_path / "none"), "questions")
    file.write_text(lines[0] + "\n" + lines[0])
    with pytest.raises(ValueError, match="questions must be about at least two texts"):
        open_suite(SuiteSettings(["question_answering"], questions=str(file)), 900, 257, TOKENIZERS["bytes"])
