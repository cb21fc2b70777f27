"""The recall study: the state it plots, what it trains again and what not, and that its training learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.benchmarks.learning.recall_mixers import best_results, rounds, table
from longreach.benchmarks.learning.recall_training import (
    ENOUGH,
    KINDS,
    LENGTH_TASKS,
    LONGER,
    RATES,
    TASKS,
    VOCABULARY,
    Run,
    accuracy,
    learn,
    made,
    optimizers_of,
    state_bytes,
    step_on,
)
from longreach.trainer.data.recall import RecallTask

FLOAT, HEADS, DIM, TOKENS = 4, 2, 32, 24  # DIM: of values, and of a head of softmax attention
KEYS_AND_VALUES = 2 * HEADS * DIM * FLOAT  # of a token


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("softmax", 32, TOKENS * KEYS_AND_VALUES),
        ("softmax", 8, TOKENS * KEYS_AND_VALUES // 4),
        ("window", 16, 15 * KEYS_AND_VALUES),  # the next token brings the sixteenth
        ("moba", 4, TOKENS * KEYS_AND_VALUES + TOKENS // 8 * HEADS * DIM * FLOAT),  # and a mean per block of 8
        ("linear", 8, HEADS * 8 * (DIM + 1) * FLOAT),  # S and z
        ("gla", 16, HEADS * 16 * DIM * FLOAT),
        ("retnet", 4, HEADS * 4 * DIM * FLOAT),
        (
            "deltanet",
            16,
            HEADS * 16 * DIM * FLOAT + 3 * HEADS * (16 + 16 + DIM) * FLOAT,
        ),  # and 3 taps of its convolution
        ("hybrid_3", 8, 3 * HEADS * 8 * (DIM + 1) * FLOAT + TOKENS * KEYS_AND_VALUES),
        ("hybrid_7", 8, 7 * HEADS * 8 * (DIM + 1) * FLOAT + TOKENS * KEYS_AND_VALUES),
    ],
)
def test_state_is_what_the_equations_keep(kind: str, size: int, expected: int) -> None:
    assert state_bytes(kind, size, TOKENS) == expected


def result(run: Run, share: float) -> dict[str, Any]:
    by_pairs = {str(task.pairs): share for task in TASKS}
    states = {str(task.pairs): 1024 * run.size for task in TASKS}
    return {**run._asdict(), "accuracy": by_pairs, "state": states, "steps": 60, "parameters": 7, "seconds": 1.0}


def keep(run: Run, share: float, runs: Path) -> None:
    run.file(runs).write_text(json.dumps(result(run, share)))


def test_finished_runs_and_solved_models_are_not_trained_again(tmp_path: Path) -> None:
    first, *others = KINDS["linear"].sizes
    todo = [run for part in rounds("state", ["linear"], tmp_path) for run in part]
    assert len(set(todo)) == len(todo) == 3 * len(KINDS["linear"].sizes)
    assert todo[0] == Run("state", "linear", first, RATES[0])
    keep(Run("state", "linear", first, RATES[0]), ENOUGH, tmp_path)  # solved
    keep(Run("state", "linear", others[0], RATES[0]), 0.5, tmp_path)
    left = [run for part in rounds("state", ["linear"], tmp_path) for run in part]
    assert {run for run in todo if run.size in others and run != (*todo[0][:2], others[0], RATES[0])} == set(left)


def test_rows_of_every_length_ask_for_as_much() -> None:
    assert {(task.pairs, task.queries) for task in (*LENGTH_TASKS, *LONGER)} == {(8, 16)}


def test_the_best_rate_is_shown(tmp_path: Path) -> None:
    for rate, share in zip(RATES, (0.25, 0.75, 0.5), strict=True):
        keep(Run("state", "gla", 8, rate), share, tmp_path)
    results = best_results("state", ["gla", "linear"], tmp_path)
    assert list(results) == [("gla", 8)]
    assert results["gla", 8]["rate"] == RATES[1]
    last = table(results, "{} pairs").splitlines()[-1]
    assert last == f"| GLA | key_dim 8 | 7 | 8.0 KiB | 75.0 | 75.0 | 75.0 | 75.0 | 60 | {RATES[1]} | 3 |"


@pytest.mark.slow
def test_a_small_model_learns_an_easy_problem() -> None:
    torch.manual_seed(0)
    task, model = RecallTask(8, 2, 2, VOCABULARY, power=1.0), made("softmax", 16)
    assert accuracy(model, task, 5000, 128) < 0.1
    curve = learn(model, (task,), 0.01, steps=160)
    assert curve[-1][1][0] >= ENOUGH
    assert curve[-1][0] < 160  # it ends where the task is recalled
    assert accuracy(model, task, 5000, 128) > 0.95


def test_the_indexer_learns_too() -> None:
    model = made("indexer", 4)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "indexer" in name}
    model.at_step(0)
    step_on(model, TASKS[0], 0, optimizers_of(model, 0.02))
    same = [name for name, weight in model.named_parameters() if name in before and torch.equal(before[name], weight)]
    assert before
    assert not same
