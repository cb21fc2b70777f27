"""Recall problems: counted by naive loops, drawn the same everywhere, and the accuracy that evaluation measures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.launch.export import ExportSettings, export
from longreach.launch.generate import GenerationSettings, generate
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.trainer.data.corpus import open_corpus
from longreach.trainer.data.packing import NO_TARGET, batch
from longreach.trainer.data.recall import RecallCorpus, RecallTask
from longreach.trainer.data.settings import DataSettings, RecallSettings
from longreach.trainer.engine import Engine, EngineSettings, OptimizerSettings
from longreach.trainer.evaluation.evaluation import evaluate


def opened(sequence_length: int = 64, vocabulary: int | None = 40, **chosen: object) -> RecallCorpus:
    recall = RecallSettings(**{"pairs": 4, **chosen})  # type: ignore[arg-type]
    corpus = open_corpus(
        DataSettings("recall", sequence_length=sequence_length, vocabulary_size=vocabulary, recall=recall), seed=3
    )
    assert isinstance(corpus, RecallCorpus)
    return corpus


@st.composite
def tasks(draw: st.DrawFn) -> RecallTask:
    pairs, queries = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    spread = draw(st.none() | st.integers(2 * pairs, 2 * pairs + 20))
    return RecallTask(
        length=(2 * pairs if spread is None else spread) + 2 * queries + draw(st.integers(0, 30)),
        pairs=pairs,
        queries=queries,
        vocabulary=2 * (pairs + 1) + draw(st.integers(0, 30)),
        power=draw(st.sampled_from([0.01, 0.5, 1.0])),
        filler=draw(st.sampled_from(["blank", "random"])),
        seed=draw(st.integers(0, 2**64 - 1)),
        spread=spread,
    )


@settings(deadline=None, max_examples=40)
@given(task=tasks(), number=st.integers(0, 2**63), split=st.sampled_from(["train", "validation"]))
def test_every_target_is_the_value_that_the_key_had(task: RecallTask, number: int, split: str) -> None:
    tokens, targets = (x.tolist() for x in task.problem(split, number))
    half, start = task.vocabulary // 2, 2 * task.pairs if task.spread is None else task.spread
    assert len(tokens) == len(targets) == task.length
    blank = dataclasses.replace(task, filler="blank").problem(split, number)[0].tolist()  # whose filler shows the pairs
    pairs_at = [i for i in range(0, start - 1, 2) if blank[i]]
    assert len(pairs_at) == task.pairs
    value_of = {tokens[i]: tokens[i + 1] for i in pairs_at}
    if task.spread is None:
        assert pairs_at == list(range(0, start, 2))
    else:
        assert sum(token in value_of for token in tokens[:start]) == task.pairs
    assert len(value_of) == len(set(value_of.values())) == task.pairs
    assert all(1 <= key < half <= value < task.vocabulary for key, value in value_of.items())
    asked = []
    for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        queried = place >= start and token in value_of
        assert target == (value_of[token] if queried else NO_TARGET)
        if queried:
            assert tokens[place + 1] == target
            asked.append(token)
        elif task.filler == "blank" and targets[place - 1] == NO_TARGET and not {place, place - 1} & set(pairs_at):
            assert token == 0
        elif task.filler == "random":
            assert token != 0
    assert len(asked) == task.queries
    times = [asked.count(key) for key in value_of]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_query_places_follow_the_power_law(power: float) -> None:
    task = RecallTask(length=42, pairs=1, queries=1, vocabulary=4, power=power)
    found = np.zeros(20)
    for number in range(1500):
        _, targets = task.problem("train", number)
        (place,) = np.flatnonzero(targets != NO_TARGET)
        assert place % 2 == 0
        found[place // 2 - 1] += 1
    law = np.array([i ** (power - 1) for i in range(1, 21)])
    expected = 1500 * law / law.sum()
    # 43.8 is the 99.9th percentile of chi squared with 19 degrees of freedom.
    assert ((found - expected) ** 2 / expected).sum() < 43.8


def test_spread_pairs_stand_anywhere_alike() -> None:
    task = RecallTask(length=50, pairs=2, queries=1, vocabulary=6, spread=41)
    found = np.zeros(20)
    for number in range(1000):
        tokens, targets = task.problem("train", number)
        assert not tokens[40]  # the last of an odd number is filler
        found += tokens[:40:2] > 0
        assert np.flatnonzero(targets != NO_TARGET)[0] > 40
    # 43.8 is the 99.9th percentile of chi squared with 19 degrees of freedom; two of 20 places vary a little less.
    assert ((found - 100) ** 2 / 100).sum() < 43.8


def test_problems_depend_on_seed_split_and_number_alone() -> None:
    task, again = opened().task, opened(sequence_length=128, length=64).task
    assert task == again
    drawn = {
        (split, number, seed): tuple(dataclasses.replace(task, seed=seed).problem(split, number)[0].tolist())
        for split in ("train", "validation")
        for number in (0, 1, 2**40)
        for seed in (0, 1)
    }
    assert len(set(drawn.values())) == len(drawn)
    # Pinned: a resumed run must find its problems after an update of numpy.
    small = RecallTask(length=14, pairs=2, queries=2, vocabulary=12, filler="random")
    assert small.problem("train", 7)[0].tolist() == [1, 7, 2, 11, 2, 11, 7, 8, 5, 9, 1, 7, 7, 3]
    spread = dataclasses.replace(small, spread=8)
    assert spread.problem("train", 7)[0].tolist() == [7, 8, 2, 11, 1, 7, 7, 3, 2, 11, 1, 7, 3, 11]


def test_rows_hold_whole_problems_and_do_not_depend_on_the_ranks() -> None:
    corpus = opened(sequence_length=128, length=32, validation_documents=6)
    task, train, held_out = corpus.task, corpus.train, corpus.validation
    whole = batch(train, range(8, 16))
    parts = [batch(train, range(8 + 2 * rank, 10 + 2 * rank)) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert all([run.length for run in row] == [32] * 4 for row in whole.documents.runs)
    expected = np.concatenate([task.problem("train", n)[0] for n in range(32, 64)])
    np.testing.assert_array_equal(whole.tokens.flatten().numpy(), expected)
    assert train.rows is None
    assert held_out.rows == 2
    rows = [held_out.row(n) for n in range(3)]
    assert [row.lengths for row in rows] == [[32] * 4, [32] * 2, []]
    np.testing.assert_array_equal(rows[1].tokens[32:64], task.problem("validation", 5)[0])
    assert [int((row.targets != NO_TARGET).sum()) for row in rows] == [16, 8, 0]


def test_a_set_number_of_problems_begins_again() -> None:
    recall = RecallSettings(length=32, pairs=4)
    train = open_corpus(DataSettings("recall", sequence_length=64, max_documents=3, recall=recall)).train
    tokens = np.concatenate([train.row(n).tokens for n in range(3)]).reshape(6, 32)
    np.testing.assert_array_equal(tokens[:3], tokens[3:])
    assert len(np.unique(tokens, axis=0)) == 3


def test_resuming_needs_the_same_problems() -> None:
    train = opened().train
    assert train.fingerprint == "4050107fd0cd3ac8ebedce8bdd671a92"  # of runs made before data.recall.spread came
    assert train.resume(train.state(5)) == 5
    for other in (opened(seed=1), opened(pairs=5), opened(vocabulary=42), opened(filler="random"), opened(spread=8)):
        with pytest.raises(ValueError, match="fingerprint"):
            other.train.resume(train.state(5))
    with pytest.raises(ValueError, match="sequence_length"):
        opened(sequence_length=128, length=64).train.resume(train.state(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": RecallSettings(pairs=17)}, r"data\.sequence_length must be at least 68, .* got 64"),
        ({"recall": RecallSettings(length=16, pairs=4, queries=5)}, r"data\.recall\.length must be at least 18"),
        ({"recall": RecallSettings(length=48, pairs=4)}, r"data\.recall\.length must divide .*=64.* got 48"),
        ({"recall": RecallSettings(pairs=0)}, r"data\.recall\.pairs must be at least 1"),
        ({"recall": RecallSettings(pairs=4, spread=7)}, r"data\.recall\.spread must be at least 8, .* got 7"),
        ({"recall": RecallSettings(pairs=4, spread=57)}, r"data\.sequence_length must be at least 65, .*spread=57"),
        ({"recall": RecallSettings(queries=0)}, r"data\.recall\.queries must be at least 1"),
        ({"recall": RecallSettings(validation_documents=0)}, r"validation_documents must be at least 1"),
        ({"recall": RecallSettings(power=0.0)}, r"data\.recall\.power must lie in \(0, 1\]; got 0\.0"),
        ({"recall": RecallSettings(power=math.nan)}, r"data\.recall\.power must lie in"),
        ({"recall": RecallSettings(filler="noise")}, r"data\.recall\.filler must be one of blank, random; got 'noise'"),
        ({"recall": RecallSettings(seed=-1)}, r"data\.recall\.seed must lie within"),
        ({"vocabulary_size": 33}, r"data\.vocabulary_size must be at least 34, .* got 33"),
        ({"max_documents": 0}, r"data\.max_documents must be at least 1"),
        ({"tokenizer": "bytes"}, r"data\.tokenizer must be left out with data=recall"),
        ({"validation_fraction": 0.1}, r"data\.validation_fraction must be left out"),
        ({"path": "texts"}, r"data\.path must be left out with data=recall"),
        ({"source": "stdlib", "recall": RecallSettings(pairs=3)}, r"data\.recall must be left out with data=stdlib"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus(DataSettings(**{"source": "recall", "sequence_length": 64, **changes}))  # type: ignore[arg-type]


LENGTH, ROWS = 24, 5


def accuracy(rank: int, world: int, sequence: int, stage: int) -> tuple[float, float, list[float]]:
    """Of a random model: `evaluate` on shared rows, and what whole logits say, counted token by token."""
    corpus = opened(LENGTH, vocabulary=8, pairs=2, queries=6, length=LENGTH, validation_documents=ROWS)
    mesh, layout = Mesh.create(sequence), Layout(LENGTH, sequence, 2)
    softmax = partial(SoftmaxAttention, heads=2)
    engine = Engine(
        lambda: LanguageModel(
            vocabulary=8,
            width=16,
            depth=1,
            pattern=["softmax"],
            mixers={"softmax": softmax},
            feed_forward=partial(SwiGLU, hidden=16),
            initial_std=1.0,
        ),
        settings=EngineSettings(stage),
        optimizer=OptimizerSettings(),
        mesh=mesh,
        device=torch.device("cpu"),
    )
    loss = evaluate(engine, corpus.validation, layout, Strategy(), ROWS, 2)
    total, right, targets = 0.0, 0, 0
    for number in range(ROWS):  # every rank, since each gathers parameters
        part = batch(corpus.validation, [number])
        with torch.no_grad():
            logits = engine(part.tokens, Sequence.single(part.documents))[0]
        for scores, target in zip(logits, part.targets[0].tolist(), strict=True):
            if target != NO_TARGET:
                total -= float(scores.log_softmax(-1)[target])
                right += scores.tolist().index(max(scores.tolist())) == target
                targets += 1
    assert loss.targets == targets == 6 * ROWS
    assert loss.correct == right
    assert 0 < right < targets
    return loss.accuracy, right / targets, [loss.mean, total / targets]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sequence", "stage"), [(1, 1, 1), (2, 2, 3), (2, 1, 1)])
def test_accuracy_is_that_of_whole_logits(world: int, sequence: int, stage: int) -> None:
    for got, expected, (mean, other) in run_ranks(world, accuracy, sequence, stage):
        assert got == expected
        assert mean == pytest.approx(other, rel=1e-5)


ROOT = Path(__file__).resolve().parents[3]
SETTINGS = (
    "data=recall",
    "data.vocabulary_size=32",
    "data.sequence_length=32",
    "data.recall.length=16",
    "data.recall.pairs=2",
    "data.rows_per_step=4",
    "model=llama_tiny",
    "model.width=32",
    "model.depth=2",
    "model.mixers.softmax.heads=2",
    "model.feed_forward.hidden=48",
    "evaluation.every=2",
    "evaluation.context=4",
    "evaluation.baselines=true",
    "checkpoint.every=2",
    "trainer.steps=4",
    "logger.wandb.mode=disabled",
    "logger.memory=false",
)


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return commands.run("longreach.launch.train", *SETTINGS, *overrides, folder=Path.cwd(), environment=environment)


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("whole", "resumed")}
    done = train(f"run.dir={runs['whole']}")
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (
        "2 pairs and 2 queries in 16 tokens",
        "accuracy ",
        "a value by chance              6.25%",
        "to resume",
    ):
        assert said in done.stdout
    assert "bits per byte" not in done.stdout
    assert "more text" not in done.stdout
    records = [json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    validation = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validation] == [2, 4]
    assert all(0 <= record["accuracy"] <= 1 and "bits_per_byte" not in record for record in validation)
    assert 0 <= validation[-1]["truncated_accuracy"] <= 1

    middle = f"checkpoint.resume={runs['whole'] / 'checkpoints' / 'step-00000002'}"
    again = train(middle, f"run.dir={runs['resumed']}")
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = [json.loads(line) for line in (runs["resumed"] / "metrics.jsonl").read_text().splitlines()]
    exact = ("step", "tokens", "loss", "grad_norm", "validation_loss", "accuracy")
    expected = [record for record in records if record["step"] > 2]
    assert [[r.get(key) for key in exact] for r in resumed] == [[r.get(key) for key in exact] for r in expected]

    given = {"checkpoint": str(runs["whole"])}
    for refused in (
        lambda: generate(GenerationSettings(**given, prompt="a")),
        lambda: export(ExportSettings(**given, path=str(tmp_path / "out"))),
    ):
        with pytest.raises(ValueError, match="checkpoint must be of a model of text"):
            refused()
