"""Scores of tasks: known ones of models built by hand, chance, greedy decoding itself, and the same on ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks, run_threads
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.launch.build import build
from longreach.models.decoding import continue_all, generate
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import this_rank
from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.engine import Engine, EngineSettings, OptimizerSettings
from longreach.trainer.evaluation import evaluation, scoring
from longreach.trainer.evaluation.checkpoints import by_position
from longreach.trainer.evaluation.documents import LongDocuments
from longreach.trainer.evaluation.evaluation import Whole, evaluate
from longreach.trainer.evaluation.sample import draw_sample
from longreach.trainer.evaluation.scoring import Cell, Scores, score
from longreach.trainer.evaluation.suite import SuiteSettings, layout_for, metrics, open_suite
from longreach.trainer.evaluation.tasks.catalogue import tasks_of
from longreach.trainer.evaluation.tasks.drawing import Draw
from longreach.trainer.evaluation.tasks.task import Material, Problem, Task

MIXERS = "longreach.models.mixers"
SOFTMAX = {"_target_": f"{MIXERS}.softmax.softmax_attention.SoftmaxAttention", "_partial_": True, "heads": 1}
LIGHTNING = {"_target_": f"{MIXERS}.linear.lightning_attention.LightningAttention", "_partial_": True, "heads": 2}
VOCABULARY = 40


def copying_model() -> Any:
    """Built by hand: a token attends to those that come after the same token, and predicts them.

    The residual stream holds tokens as unit vectors; keys are those of the token before, by a convolution of two taps.
    """
    made: Any = build(
        {
            "_target_": "longreach.models.language_model.LanguageModel",
            "vocabulary": VOCABULARY,
            "width": VOCABULARY,
            "depth": 1,
            "pattern": ["softmax"],
            "mixers": {"softmax": {**SOFTMAX, "rope_base": None, "conv_size": 2}},
        }
    ).double()
    made.initialise(0)
    one = torch.eye(VOCABULARY, dtype=torch.float64)
    mixer = made.blocks[0].mixer
    with torch.no_grad():
        for weight, factor in (
            (made.embedding.weight, 1.0),
            (made.head.weight, 3.0),
            (mixer.query.weight, 20.0),
            (mixer.key.weight, 1.0),
            (mixer.value.weight, 1.0),
            (mixer.output.weight, 10.0),
        ):
            weight.copy_(factor * one)
        mixer.conv.weight.zero_()
        queries, keys, values = mixer.conv.weight.split(VOCABULARY)
        queries[:, 1] = keys[:, 0] = values[:, 1] = 1.0  # keys are of the token before
    return made


def random_model(vocabulary: int = VOCABULARY) -> Any:
    made = without_values(vocabulary).double()
    made.initialise(0)
    return made


def without_values(vocabulary: int = VOCABULARY) -> Any:
    return build(
        {
            "_target_": "longreach.models.language_model.LanguageModel",
            "vocabulary": vocabulary,
            "width": 16,
            "depth": 2,
            "pattern": ["lightning", "softmax"],
            "mixers": {"softmax": {**SOFTMAX, "heads": 2}, "lightning": LIGHTNING},
            "feed_forward": {
                "_target_": "longreach.models.feed_forward.swiglu.SwiGLU",
                "_partial_": True,
                "hidden": 16,
            },
            "initial_std": 0.3,
        }
    )


def gathered(numbers: list[float], mesh: Mesh) -> torch.Tensor:
    """`gather_numbers` on threads, which have no group of all processes."""
    mine, thread = torch.tensor(numbers, dtype=torch.float64), this_rank()
    if thread is None or mesh.world_size == 1:
        return mine[None]
    out = mine.new_empty(mesh.world_size * len(mine))
    thread.group(range(mesh.world_size)).all_gather(out, mine)
    return out.view(mesh.world_size, -1)


@pytest.fixture(autouse=True)
def ranks_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "gather_numbers", gathered)
    monkeypatch.setattr(evaluation, "gather_numbers", gathered)


def scores(rank: int, world: int, make: Any, entry: Any, length: int, ranks: int = 1, spans: int = 1, **given: Any):
    (chosen,) = tasks_of([entry], "tasks")
    model = make()
    whole = Whole(model, Mesh.create(ranks), torch.device("cpu"))
    cell = Cell(chosen.task, length, given.get("depth", 0.0), given.get("problems", 6))
    of = Material(given.get("vocabulary", VOCABULARY))
    return score(whole, cell, of, layout_for(length, ranks, spans), Strategy(), given.get("places", 64))


@pytest.mark.parametrize(
    ("entry", "depth"),
    [("mqar", 0.0), ({"task": "induction", "kinds": 30}, 0.0), ("induction", 0.5), ("induction", 1.0)],
)
def test_a_copying_model_built_by_hand_answers_everything(entry: Any, depth: float) -> None:
    found = scores(0, 1, copying_model, entry, 101, depth=depth)
    assert found[:2] == (1.0, 1.0)
    assert found.loss < 0.01


def test_a_random_model_is_right_by_chance() -> None:
    # 400 draws of 1/2 are within 3 standard deviations of 0.025 each.
    parity = scores(0, 1, random_model, "parity", 24, problems=400, places=4000)
    assert abs(parity.choice - 0.5) < 0.075
    (chosen,) = tasks_of([{"task": "induction", "kinds": 10}], "tasks")
    assert chosen.task.chance(12) == 0.1
    found = scores(
        0, 1, lambda: random_model(12), {"task": "induction", "kinds": 10}, 24, problems=400, places=4000, vocabulary=12
    )
    assert abs(found.accuracy - 0.1) < 0.045
    assert found.loss > math.log(10)


@cache
def alone(name: str, length: int) -> Scores:
    return scores(0, 1, random_model if name == "parity" else half_right, name, length, problems=5, places=10**6)


def half_right() -> Any:
    """The copying model with a bent head, which never says an even token."""
    made = copying_model()
    with torch.no_grad():
        made.head.weight[::2] *= -1
    return made


@pytest.mark.parametrize(
    ("name", "world", "ranks", "spans"),
    [("mqar", 2, 1, 1), ("mqar", 2, 2, 1), ("mqar", 4, 2, 2), ("mqar", 3, 3, 2), ("parity", 4, 2, 2)],
)
def test_ranks_have_the_scores_of_one(name: str, world: int, ranks: int, spans: int) -> None:
    length = 101  # which no number of ranks divides
    make = random_model if name == "parity" else half_right
    found = run_threads(world, lambda rank, size: scores(rank, size, make, name, length, ranks, spans, problems=5))
    one = alone(name, length)
    assert name == "parity" or 0 < one.accuracy < 1
    for each in found:
        assert (each.accuracy, each.exact, each.choice) == (one.accuracy, one.exact, one.choice)
        assert each.loss == pytest.approx(one.loss, rel=1e-12)


@cache
def speaker() -> Any:
    return random_model().eval()


@dataclass(frozen=True)
class Continued(Task):
    """Drawn tokens, and what greedy decoding writes behind them: of even numbers as it is, of odd ones with a fault."""

    name = "continued"
    paper = ""

    def check(self, material: Material) -> None:
        pass

    def least(self, material: Material, number: int) -> int:
        return 6

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        prompt = self.draw(material, number).below(VOCABULARY, length - 5).tolist()
        written = list(generate(speaker(), prompt, max_new_tokens=5, temperature=0))
        if number % 2:
            written[number % 5] = (written[number % 5] + 1) % VOCABULARY
        return Problem.of(np.array([*prompt, *written]), np.arange(length - 5, length), np.zeros(5, np.int64))


def test_an_answer_is_right_if_greedy_decoding_writes_it() -> None:
    whole = Whole(random_model(), Mesh(), torch.device("cpu"))
    for number, (problems, share) in enumerate([(1, 1.0), (2, 0.5), (6, 0.5)]):
        cell = Cell(Continued(), 20 + number, 0.0, problems)
        found = score(whole, cell, Material(VOCABULARY), Layout(20 + number), Strategy(), 100)
        assert found[:2] == (share, share)


def test_shares_are_of_answers_of_problems_and_of_choices() -> None:
    # Two problems with three choices and two answers: (right tokens, tokens, loss).
    sums = np.zeros((3, 2, 3, 2))
    sums[1] = 2
    sums[0, 0, 0] = (2, 1)
    sums[0, 1, 0] = (2, 2)
    sums[2] = [[[1, 3], [5, 0], [1, 1]], [[1, 1], [1, 2], [9, 9]]]
    found = scoring._scores(sums)
    assert found == Scores(accuracy=0.75, exact=0.5, loss=(1 + 3 + 1 + 1) / 8, choice=0.5)


def test_lines_and_metrics_of_a_suite() -> None:
    suite = open_suite(
        SuiteSettings([{"task": "induction", "kinds": 20}, "mqar"], lengths=[64, 70], problems=2, depths=[0.0, 1.0]),
        999,
        VOCABULARY,
    )
    lines = suite.score(Whole(copying_model(), Mesh(), torch.device("cpu")), 1, 1, Strategy())
    assert [(line["task"], line["length"], line["depth"]) for line in lines] == [
        (task, length, depth)
        for length in (64, 70)
        for task, depth in (("induction_kinds_20", 0.0), ("induction_kinds_20", 1.0), ("mqar", None))
    ]
    lines[0]["accuracy"] = 0.0
    record = metrics(lines)
    assert record["tasks"] == lines
    assert record["task_induction_kinds_20_64_accuracy"] == 0.5
    assert record["task_mqar_70_accuracy"] == record["task_induction_kinds_20_70_exact"] == 1.0
    assert "task_mqar_70_choice" not in record


class Texts:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, VOCABULARY, (70, 10, 41, 40, 90, 33)[number])


def read(rank: int, world: int, ranks: int, spans: int) -> Any:
    layout = layout_for(40, ranks, spans)
    whole = Whole(random_model(), Mesh.create(ranks), torch.device("cpu"))
    return evaluate(whole, LongDocuments(Texts(), 40, layout.length, "lengths"), layout, Strategy(), 3, 1, True)


def test_long_documents_are_read_from_their_beginning_and_positions_average_to_the_loss() -> None:
    model, total, found = random_model(), 0.0, read(0, 1, 1, 1)
    for number in (0, 2, 4):  # those with a target behind 40 tokens
        ids = torch.from_numpy(Texts()[number][:41])
        with torch.no_grad():
            logits = model(ids[None, :40], Sequence.single(Documents.whole(1, 40)))[0]
        total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    assert (found.total, found.targets) == (pytest.approx(total, rel=1e-12), 120)
    lines = by_position(found)
    assert [(line["first"], line["last"], line["targets"]) for line in lines] == [
        (0, 15, 48),
        (16, 31, 48),
        (32, 63, 24),
    ]
    assert sum(line["loss"] * line["targets"] for line in lines) / 120 == pytest.approx(found.mean, rel=1e-12)
    for each in run_threads(3, read, 3, 1):  # which pad the rows to 42
        assert each.targets == 120
        assert each.total == pytest.approx(found.total, rel=1e-12)
    with pytest.raises(
        ValueError, match=r"lengths must be less than the longest of the 6 documents, 90 tokens; got 90"
    ):
        LongDocuments(Texts(), 90, 90, "lengths")


def under_zero(rank: int, world: int, sequence: int, stage: int) -> Scores:
    engine = Engine(
        without_values,
        settings=EngineSettings(stage, {}),
        optimizer=OptimizerSettings(),
        mesh=Mesh.create(sequence),
        device=torch.device("cpu"),
    )
    cell = Cell(tasks_of(["parity"], "tasks")[0].task, 25, 0.0, 5)
    return score(engine, cell, Material(VOCABULARY), layout_for(25, sequence, 2), Strategy(), 26)


@pytest.mark.slow
def test_scores_are_the_same_at_every_stage_of_zero() -> None:
    (one,) = run_ranks(1, under_zero, 1, 0)
    for stage, sequence in ((3, 2), (2, 1), (1, 2)):
        for each in run_ranks(2, under_zero, sequence, stage):
            assert (each.accuracy, each.exact, each.choice) == (one.accuracy, one.exact, one.choice)
            assert each.loss == pytest.approx(one.loss, rel=1e-5)


@dataclass(frozen=True)
class Written(Task):
    """Rows whose last tokens were decoded: of even numbers as they are, of odd ones with a fault."""

    name = "written"
    paper = ""

    rows: tuple[tuple[int, ...], ...]

    def check(self, material: Material) -> None:
        pass

    def least(self, material: Material, number: int) -> int:
        return 6

    def problem(self, material: Material, length: int, number: int, depth: float = 0.0) -> Problem:
        tokens = np.array(self.rows[number][:length])
        if number % 2:
            tokens[length - 1 - number] = (tokens[length - 1 - number] + 1) % VOCABULARY
        return Problem.of(tokens, np.arange(length - 5, length), np.zeros(5, np.int64))


def decoded_under_zero(rank: int, world: int, sequence: int, stage: int) -> Any:
    """Four rows continued by 5 to 8 tokens, each data rank its own; their scores, those of tasks, and a sample."""
    tokenizer, device = byte_tokenizer(), torch.device("cpu")
    engine = Engine(
        partial(without_values, tokenizer.vocabulary_size),
        settings=EngineSettings(stage, {}),
        optimizer=OptimizerSettings(),
        mesh=Mesh.create(sequence),
        device=device,
    )
    mesh, model = engine.mesh, engine.module.eval()
    prompts = [Draw(0, "prompts", row).below(VOCABULARY, 20).tolist() for row in range(4)]
    mine = range(4)[4 // mesh.data_ranks * mesh.data_rank :][: 4 // mesh.data_ranks]
    rows = [list(prompts[row]) for row in mine]

    def ends(place: int, token: int) -> bool:
        rows[place].append(token)
        return len(rows[place]) == 25 + mine[place]

    for _ in continue_all(
        model, [prompts[row] for row in mine], max_new_tokens=9, temperature=0, ends=ends, mesh=mesh, together=True
    ):
        pass
    every: list[Any] = [rows] * world
    if world > 1:
        torch.distributed.all_gather_object(every, rows)
    found = tuple(tuple(row) for part in every[::sequence] for row in part)
    layout, material = layout_for(25, sequence, 2), Material(tokenizer.vocabulary_size)
    own = score(engine, Cell(Written(found), 25, 0.0, 4), material, layout, Strategy(), 26)
    chosen = SuiteSettings(["passkey", "parity", {"task": "mqar", "pairs": 3}], lengths=[301], problems=3, depths=[0.3])
    suite = open_suite(chosen, 301, tokenizer.vocabulary_size, tokenizer)
    lines = suite.score(engine, sequence, 2, Strategy())
    corpus: Any = SimpleNamespace(tokenizer=tokenizer)
    return found, own, lines, draw_sample(engine, corpus, "Ab", tokens=9, temperature=0.8, seed=1)


@pytest.mark.slow
def test_ranks_that_share_rows_and_parameters_decode_and_score_as_one_does() -> None:
    ((rows, own, lines, text),) = run_ranks(1, decoded_under_zero, 1, 0)
    assert [len(row) for row in rows] == [25, 26, 27, 28]
    assert own[:2] == (0.5, 0.5)
    for found in run_ranks(4, decoded_under_zero, 2, 3):
        assert found[0] == rows
        assert found[1][:2] == own[:2]
        for line, expected in zip(found[2], lines, strict=True):
            assert line == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-5)}
        assert found[3] == text
