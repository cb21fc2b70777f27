"""Multi-query associative recall (MQAR, arXiv 2312.04927) by every kind of mixer: accuracy against bytes of state.

    python benchmarks/learning/recall_mixers.py [--studies state length] [--kinds linear gla …]
                                                [--runs runs/recall_mixers] [--jobs 1] [--minutes 60] [--write]

`state`: models of width 64, in which each mixer stands behind a gated short convolution, learn problems of 4, 8, 16 and
32 pairs in turn, at three learning rates, of which the best is kept; the size of the state is varied. `length`: a model
of each kind learns 4 pairs, then 8 in rows of 64 to 512 tokens, and is tested in rows of up to 8,192.
Runs that are finished in the folder are not run again; `--minutes` starts no run later, and `--studies` without a name
starts none. `--write` keeps the table in benchmarks/results/ and the figures in docs/ of the runs that there are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from longreach.benchmarks.learning.recall_training import (
    ENOUGH,
    HEADS,
    KINDS,
    LENGTH_TASKS,
    LONGER,
    PATIENT,
    RATES,
    STEPS,
    TASKS,
    TESTED_ROWS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Run,
    train,
)
from longreach.benchmarks.machine import RESULTS, machine

DOCS = RESULTS.parent.parent / "docs"
PAGE = RESULTS / "recall_mixers_cpu.md"
STUDIES = ("state", "length")
TITLES = {"state": "Accuracy against state", "length": "Longer rows than those that were learned"}
HEADINGS = {"state": "{} pairs", "length": "{:,} tokens"}
TOLD = {
    "state": (
        f"A gated short convolution and one mixer (hybrids: several), width {WIDTH}, {HEADS} heads, no feed-forward "
        f"layers, no rotary positions but in RetNet. P pairs in 4 P tokens, each asked for once, vocabulary "
        f"{VOCABULARY}; {TOKENS:,} tokens a step, at most {STEPS} steps, seed 0. The columns of pairs give the percent "
        f"of held-out queries recalled (guessing: {100 / TASKS[0].values:.1f}). State: what decoding keeps of "
        f"{TASKS[-1].length} tokens for the mixers, in float32. The best of the learning rates "
        f"{', '.join(map(str, RATES))} is shown; the others are not tried where one recalls {ENOUGH:.0%} of every "
        f"task. Hybrids, which are deeper, may take {PATIENT} times the steps."
    ),
    "length": (
        f"The same models, of the largest state, learned {TASKS[0].pairs} pairs in {TASKS[0].length} tokens first, and "
        f"then {LENGTH_TASKS[0].pairs} pairs anywhere in the first half of rows of "
        f"{', '.join(str(task.length) for task in LENGTH_TASKS)} tokens, queries anywhere in the second and blanks "
        "between, and were tested in longer rows without another step. Percent of queries recalled. State: of "
        f"{LENGTH_TASKS[-1].length} tokens. Each length is tested with {TESTED_ROWS * LONGER[0].queries} queries, "
        f"{LONGER[0].queries} a row as in training."
    ),
}  # fmt: skip


def cells(study: str, kinds: list[str]) -> list[list[tuple[str, int]]]:
    """(kind, size) of all models, by waves: the most telling ones first."""
    if study == "length":
        return [[(kind, length_size(kind)) for kind in kinds]]
    found: dict[int, list[tuple[str, int]]] = {}
    for kind in kinds:
        for place, size in enumerate(KINDS[kind].sizes):
            found.setdefault(KINDS[kind].wave + place, []).append((kind, size))
    return [found[wave] for wave in sorted(found)]


def length_size(kind: str) -> int:
    """The largest of a kind that is not a hybrid, so that lengths are compared rather than sizes."""
    return max(KINDS[kind].sizes)


def best_of(study: str, kind: str, size: int, runs: Path) -> dict[str, Any] | None:
    """The result of the learning rate that recalls most, over all tasks that were learned."""
    found = [result for rate in RATES if (result := Run(study, kind, size, rate).result(runs)) is not None]
    return max(found, key=mean_accuracy, default=None)


def mean_accuracy(result: Mapping[str, Any]) -> float:
    return sum(list(result["accuracy"].values())[: len(TASKS)]) / len(TASKS)


def rounds(study: str, kinds: list[str], runs: Path) -> Iterator[list[Run]]:
    """What is still to be trained, in the order of telling most; another rate only where none has solved the tasks."""
    waves = cells(study, kinds)
    for place in range(len(waves) + len(RATES) - 1):
        for number, rate in enumerate(RATES):
            wave = waves[place - number] if 0 <= place - number < len(waves) else []
            todo = [Run(study, kind, size, rate) for kind, size in wave if not solved(study, kind, size, runs)]
            yield [run for run in todo if run.result(runs) is None]


def solved(study: str, kind: str, size: int, runs: Path) -> bool:
    best = best_of(study, kind, size, runs)
    return best is not None and min(list(best["accuracy"].values())[: len(TASKS)]) >= ENOUGH


def finish(run: Run, runs: Path, until: float) -> str:
    """Trains what the run is, unless time is up, and keeps its result; what is to be said of it."""
    if time.time() > until:
        return f"{run}: not begun"
    result = train(run)
    unfinished = run.file(runs).with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(run.file(runs))
    told = ", ".join(f"{key}: {share:.1%}" for key, share in result["accuracy"].items())
    return f"{'-'.join(map(str, run))}: {told} after {result['steps']} steps, {result['seconds']:.0f} s"


def best_results(study: str, kinds: list[str], runs: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By (kind, size), of those that there are, sizes in order; `rates` is how many rates were tried."""
    found = {}
    for kind, size in [(each, size) for each in kinds for size in sorted(KINDS[each].sizes)]:
        if (best := best_of(study, kind, size, runs)) is not None:
            rates = sum(Run(study, kind, size, rate).file(runs).exists() for rate in RATES)
            found[kind, size] = {**best, "rates": rates}
    return found


def table(results: Mapping[tuple[str, int], dict[str, Any]], heading: str) -> str:
    """A line for each model, blank where one was not tested; heading: of a column, for a number of pairs or tokens."""
    columns = max((list(found["accuracy"]) for found in results.values()), key=len)
    heads = ["mixer", "size", "parameters", "state", *(heading.format(int(column)) for column in columns)]
    lines = [f"| {' | '.join([*heads, 'steps', 'rate', 'rates tried'])} |", "|---" * (len(heads) + 3) + "|"]
    for (kind, size), found in results.items():
        chosen = KINDS[kind]
        tested = found["accuracy"]
        shares = [f"{100 * tested[column]:.1f}" if column in tested else "" for column in columns]
        state = f"{found['state'][columns[len(TASKS) - 1]] / 1024:,.1f} KiB"
        ends = [found["steps"], found["rate"], found["rates"]]
        cells = [chosen.label, f"{chosen.size} {size}", f"{found['parameters']:,}", state, *shares, *ends]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def style(kind: str) -> dict[str, Any]:
    place = list(KINDS).index(kind)
    color = colormaps["tab20"](2 * place if place < 10 else 2 * place - 19)  # the dark ones first
    marker = "os^Dv<>Pp*XhdH8sPD"[place]
    return {"color": color, "marker": marker, "markersize": 6, "linewidth": 1.4, "label": KINDS[kind].label}


def draw_state(results: Mapping[tuple[str, int], dict[str, Any]]) -> Figure:
    """Accuracy against state, a panel for each number of pairs but the smallest, and the course of training."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    places = figure.subplots(2, 2).flat
    kinds = list(dict.fromkeys(kind for kind, _ in results))
    for place, task in zip(places, TASKS[1:], strict=False):
        for kind in kinds:
            points = [found for (each, _), found in results.items() if each == kind]
            states, shares = ([found[what][str(task.pairs)] for found in points] for what in ("state", "accuracy"))
            place.plot(states, shares, **style(kind))
        place.set(title=f"{task.pairs} pairs, {task.length} tokens", xlabel="bytes of state", xscale="log")
    for (kind, size), found in results.items():
        if size == max(each for name, each in results if name == kind):
            steps, shares = zip(*found["curve"], strict=True)
            places[-1].plot(steps, [sum(each) / len(each) for each in shares], **style(kind))
    places[-1].set(title="all tasks, the largest state of each", xlabel="step")
    return finished(figure)


def draw_length(results: Mapping[tuple[str, int], dict[str, Any]]) -> Figure:
    """Accuracy by length of the row."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    place = figure.subplots()
    for (kind, _), found in results.items():
        place.plot([int(length) for length in found["accuracy"]], list(found["accuracy"].values()), **style(kind))
    place.axvline(LENGTH_TASKS[-1].length, color="black", linestyle=":", linewidth=1)
    place.set(title=f"{LONGER[0].pairs} pairs; learned left of the line", xlabel="tokens")
    place.set_xscale("log", base=2)
    lengths = [task.length for task in (*LENGTH_TASKS, *LONGER)]
    place.set_xticks(lengths, [f"{length:,}" for length in lengths])
    return finished(figure)


def finished(figure: Figure) -> Figure:
    for place in figure.axes:
        place.set(ylabel="accuracy on held-out problems", ylim=(-0.03, 1.05))
        place.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def write(studies: Mapping[str, Mapping[tuple[str, int], dict[str, Any]]], runs: Path) -> None:
    """The page of results, and a figure for each study that has any."""
    parts = [f"# Recall by mixers\n\n`python benchmarks/learning/recall_mixers.py --write`, {machine('cpu')}"]
    for study, results in studies.items():
        if results:
            seconds = [json.loads(file.read_text())["seconds"] for file in runs.glob(f"{study}-*.json")]
            told = f"{TOLD[study]} {len(seconds)} runs took {sum(seconds) / 60:.0f} minutes of one core."
            parts += [f"## {TITLES[study]}", told, table(results, HEADINGS[study])]
            (draw_state if study == "state" else draw_length)(results).savefig(DOCS / f"recall_{study}.png", dpi=100)
    PAGE.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/recall_mixers"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    runs, until = chosen.runs.resolve(), time.time() + 60 * chosen.minutes
    runs.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        for study in chosen.studies:
            for todo in rounds(study, chosen.kinds, runs):
                for told in pool.map(partial(finish, runs=runs, until=until), todo):
                    print(told, flush=True)
    studies = {study: best_results(study, list(KINDS), runs) for study in STUDIES}
    for study, results in studies.items():
        print(table(results, HEADINGS[study]) if results else f"{study}: no runs yet")
    if chosen.write:
        write(studies, runs)
        print(f"written to {PAGE} and {DOCS}")


if __name__ == "__main__":
    main()
