"""What `recall_mixers.py` trains: small models of every kind of mixer, and how they learn recall problems."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor

from longreach.benchmarks.layers.mixers import with_sizes
from longreach.kernels.documents import Documents
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.elementwise.gated_short_convolution import GatedShortConvolution
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.trainer.data.recall import RecallTask
from longreach.trainer.optimizers.groups import parameter_groups

WIDTH, HEADS, VOCABULARY, VALUE_DIM = 64, 2, 128, 32
TASKS = tuple(RecallTask(4 * pairs, pairs, pairs, VOCABULARY, power=1.0) for pairs in (4, 8, 16, 32))
LENGTH_TASKS, LONGER = (
    tuple(RecallTask(length, 8, 16, VOCABULARY, power=1.0, spread=length // 2) for length in lengths)
    for lengths in ((64, 128, 256, 512), (1024, 2048, 4096, 8192))
)
LEARNED = {"state": TASKS, "length": (TASKS[0], *LENGTH_TASKS)}  # hybrids leave a plateau on the first alone
TESTED_ROWS = 16  # of each length
TOKENS = 1024  # of a step
STEPS, EVERY, GROW, PATIENCE, PLATEAU = 400, 20, 100, 100, 200
GO_ON, ENOUGH = 0.8, 0.99
RATES = (0.02, 0.006, 0.05)
PATIENT = 3  # hybrids, which are deeper
ATTENTION = {"heads": HEADS, "kv_heads": HEADS, "rope_base": None, "qk_norm": None}
BLOCKS = {"block_size": 8, "dense_steps": 200, **ATTENTION}
KEPT_BLOCKS = 4


class Kind(NamedTuple):
    """What is shown as `label`: a mixer of conf/mixer with settings, of which `size` varies; how often it stands.

    wave: when its first size is trained. hybrid, after: how many of this mixer come before and after one of softmax
    attention. patience: of `learn`.
    """

    label: str
    mixer: str
    size: str
    sizes: tuple[int, ...]
    settings: Mapping[str, Any]
    wave: int = 0
    hybrid: int = 0
    after: int = 0
    patience: int = 1


MATRIX = {"heads": HEADS, "value_dim": VALUE_DIM}
DIMS = (16, 8, 32, 4)
KINDS = {
    "softmax": Kind("softmax", "softmax_attention", "head_dim", (32, 8), ATTENTION),
    "linear": Kind("linear", "linear_attention", "key_dim", DIMS, MATRIX),
    "gla": Kind("GLA", "gated_linear_attention", "key_dim", DIMS, {**MATRIX, "gate_rank": 16}),
    "deltanet": Kind("DeltaNet", "deltanet", "key_dim", DIMS, MATRIX),
    "gated_deltanet": Kind("Gated DeltaNet", "gated_deltanet", "key_dim", DIMS, {**MATRIX, "key_heads": HEADS}),
    "hybrid_3": Kind("3 linear : 1 softmax", "linear_attention", "key_dim", (8,), MATRIX, hybrid=3, patience=PATIENT),
    "mamba2": Kind("Mamba-2", "mamba2", "state", DIMS, {"head_dim": 32}),
    "mamba2_no_skip": Kind("Mamba-2, D from 0", "mamba2", "state", (16, 8, 32), {"head_dim": 32, "initial_skip": 0.0}),
    "window": Kind("window", "sliding_window_attention", "window", (16, 64, 32), ATTENTION),
    "retnet": Kind("RetNet", "retnet", "key_dim", DIMS, MATRIX),
    "kda": Kind("KDA", "kimi_delta_attention", "head_dim", DIMS, MATRIX),
    "mamba": Kind("Mamba", "mamba", "state", (16, 8, 32), {}),
    "s4d": Kind("S4D", "s4d", "state", (16, 64), {}),
    "hybrid_7": Kind(
        "7 linear : 1 softmax", "linear_attention", "key_dim", (8,), MATRIX, wave=1, hybrid=3, after=4, patience=PATIENT
    ),
    "moba": Kind("MoBA", "moba", "top_k", (KEPT_BLOCKS,), BLOCKS, wave=1),
    "indexer": Kind(
        "indexer", "minimax_sparse_attention", "count", (KEPT_BLOCKS,),
        {**BLOCKS, "head_dim": 32, "index_dim": 32, "rope_fraction": 1.0}, wave=1,
    ),
    "nsa": Kind(
        "NSA", "native_sparse_attention", "count", (KEPT_BLOCKS,), {
            "heads": HEADS, "kv_heads": 1, "rope_base": None, "block_size": 8, "window_size": 8, "window_stride": 4,
            "initial": 0, "local": 1, "near": 16, "compression_hidden": 32,
        }, wave=1,
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One model that is trained: its result is `<study>-<kind>-<size>-<rate>.json` in the folder of runs."""

    study: str
    kind: str
    size: int
    rate: float

    def result(self, runs: Path) -> dict[str, Any] | None:
        file = self.file(runs)
        return json.loads(file.read_text()) if file.exists() else None

    def file(self, runs: Path) -> Path:
        return runs / f"{'-'.join(map(str, self))}.json"


def problems(task: RecallTask, split: str, first: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[number, length]`."""
    found = [task.problem(split, first + index) for index in range(number)]
    tokens, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
    return tokens, targets


def made(kind: str, size: int, convolved: bool = True) -> LanguageModel:
    """The model; not `convolved`: without the convolution, whose state is none of the mixers'."""
    chosen = KINDS[kind]
    settings = {**with_sizes(chosen.mixer, {})[0], **chosen.settings, chosen.size: size}
    mixers, pattern = {"it": instantiate(settings, _convert_="all")}, ["it"] * (chosen.hybrid or 1)
    if chosen.hybrid:
        mixers["softmax"] = instantiate({**with_sizes("softmax_attention", {})[0], **ATTENTION}, _convert_="all")
        pattern = [*pattern, "softmax", *["it"] * chosen.after]
    if convolved:
        mixers["convolution"] = partial(GatedShortConvolution)
        pattern = ["convolution", *pattern]
    model = LanguageModel(
        vocabulary=VOCABULARY, width=WIDTH, depth=len(pattern), pattern=pattern, mixers=mixers, tied_embeddings=True
    )
    model.initialise(0)
    return model


@cache
def whole(rows: int, length: int) -> Sequence:
    """Rows of one problem each: made once, with all that follows from where documents start."""
    return Sequence.single(Documents.whole(rows, length))


@torch.no_grad()
def accuracy(model: LanguageModel, task: RecallTask, first: int, rows: int) -> float:
    """The share of held-out queries whose value is the likeliest token."""
    tokens, targets = problems(task, "validation", first, rows)
    _, count, correct = model(tokens, whole(*tokens.shape), targets, correct=True)
    return float(correct / count)


@torch.no_grad()
def state_bytes(kind: str, size: int, length: int) -> int:
    """What decoding keeps of a row of `length` tokens for all mixers, the convolutions before them left out."""
    cache, model = DecodingCache(), made(kind, size, convolved=False)
    model(torch.ones(1, length, dtype=torch.int64), Sequence.decoding(cache, 1, length))
    return kept_bytes(cache) + kept_bytes(cache.of("mixer"))


def kept_bytes(cache: DecodingCache) -> int:
    rows = sum(of.kept * sum(x[0, 0].numel() * x.element_size() for x in of.tensors) for of in cache.rows.values())
    return rows + sum(x.numel() * x.element_size() for x in cache.states.values())


def optimizers_of(model: LanguageModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for the rest."""
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in parameter_groups(model, 0.01, kind="muon"):
        matrices = group["kind"] == "muon"
        groups[matrices].append({"params": group["params"], "weight_decay": group["weight_decay"]})
    return [torch.optim.Muon(groups[True], lr=rate), torch.optim.AdamW(groups[False], lr=rate, betas=(0.9, 0.95))]


def step_on(model: LanguageModel, task: RecallTask, first: int, optimizers: list[torch.optim.Optimizer]) -> None:
    tokens, targets = problems(task, "train", first, TOKENS // task.length)
    seq = whole(*tokens.shape)
    loss, count, reports = model(tokens, seq, targets, reports=True)
    total, counts = loss / count, model.loss_counts(seq.documents)
    for (path, weight), divisor in zip(model.losses.items(), counts, strict=True):
        total = total + weight * reports[path] / divisor
    model.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def learn(
    model: LanguageModel,
    tasks: tuple[RecallTask, ...],
    rate: float,
    dense_steps: int = 0,
    steps: int = STEPS,
    patience: int = 1,
) -> list[tuple[int, list[float]]]:
    """Trains, and leaves the best weights in the model. (step, accuracy on each task), on held-out problems.

    It begins with the first task; the next one joins when the newest is recalled or has had its time. Those that have
    joined and are not yet recalled take turns. It ends when all are recalled, or when nothing has improved for long
    after the plateau before the first recall. patience: how many times as long that is, and all of it may take.
    """
    optimizers, joined, since, best, improved = optimizers_of(model, rate), 1, 0, 0.0, 0
    kept, curve, learning = copy.deepcopy(model.state_dict()), [], [tasks[0]]
    for step in range(1, patience * steps + 1):
        model.at_step(step - 1)
        step_on(model, learning[step % len(learning)], step * TOKENS, optimizers)
        if step % EVERY:
            continue
        model.at_step(max(step, dense_steps))
        recalled = [accuracy(model, task, 0, TOKENS // task.length) for task in tasks]
        curve.append((step, recalled))
        mean = sum(recalled) / len(tasks)
        improved = step if mean >= best + 0.01 else improved
        if mean > best:
            best, kept = mean, copy.deepcopy(model.state_dict())
        if min(recalled) >= ENOUGH or step - max(improved, dense_steps, patience * PLATEAU) >= patience * PATIENCE:
            break
        if joined < len(tasks) and (recalled[joined - 1] >= GO_ON or step - since >= GROW):
            joined, since = joined + 1, step
        learning = [task for task, share in zip(tasks[:joined], recalled, strict=False) if share < ENOUGH] or [tasks[0]]
    model.load_state_dict(kept)
    model.at_step(max(patience * steps, dense_steps))
    return curve


def train(run: Run) -> dict[str, Any]:
    """Trains the model of a run, and tests it on other problems than those that chose its weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start, model = time.process_time(), made(run.kind, run.size)
    tasks, kind = LEARNED[run.study], KINDS[run.kind]
    steps = STEPS + (len(tasks) - len(TASKS)) * GROW
    curve = learn(model, tasks, run.rate, int(kind.settings.get("dense_steps", 0)), steps, kind.patience)
    tested = TASKS if run.study == "state" else (*LENGTH_TASKS, *LONGER)
    keys = [task.pairs if run.study == "state" else task.length for task in tested]
    rows = [4 * TOKENS // task.length if run.study == "state" else TESTED_ROWS for task in tested]
    return {
        **run._asdict(),
        "accuracy": {
            key: accuracy(model, task, 10_000, number) for key, task, number in zip(keys, tested, rows, strict=True)
        },
        "state": {key: state_bytes(run.kind, run.size, task.length) for key, task in zip(keys, tested, strict=True)},
        "steps": curve[-1][0], "curve": curve, "parameters": model.parameter_count(),
        "seconds": time.process_time() - start,
    }  # fmt: skip
