"""Multi-query associative recall (arXiv 2312.04927) by every mixer: who recalls what with which state.

    python benchmarks/learning/recall_mixers.py [--mixers retnet mamba2 …] [--steps 800] [--jobs 2]
                                                [--runs runs/recall_mixers] [--write]

Problems of 256 tokens with 16 pairs and 64 queries, for a model of two layers of width 64, each a gated short
convolution and this mixer, with the settings of conf/mixer but for the sizes named in the table. A model learns with 2
pairs in 32 tokens, then 4 in 64, 8 in 128 and 16 in 256, and goes on to the next when it recalls 90 % of held-out
queries. Training ends with 99 % of the last, or when 240 steps have brought nothing. Results are kept in the folder of
the runs, and a mixer that has one with as many steps is not trained again.
`--write` keeps the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from torch import Tensor

from longreach.benchmarks.layers.mixers import standing_alone, with_sizes
from longreach.benchmarks.machine import RESULTS, machine
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import small_sizes
from longreach.models.mixers.elementwise.gated_short_convolution import GatedShortConvolution
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.trainer.data.recall import RecallTask

PAGE = RESULTS / "recall_mixers_cpu.md"
WIDTH, DEPTH, VOCABULARY = 64, 2, 64
STAGES = tuple(RecallTask(16 * pairs, pairs, 4 * pairs, VOCABULARY, power=1.0) for pairs in (2, 4, 8, 16))
TASK = STAGES[-1]
ROWS, HELD_OUT, EVERY, PATIENCE, GO_ON, ENOUGH = 16, 32, 20, 240, 0.9, 0.99
HEADS = {"heads": 2, "kv_heads": 2, "key_heads": 2}
SIZES = {"head_dim": 32, "key_dim": 32, "value_dim": 32, "state": 16, "gate_rank": 16, "window": 64}
MATRIX_RATE, RATE = 0.02, 5e-3


def problems(task: RecallTask, split: str, first: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[number, length]`."""
    found = [task.problem(split, first + index) for index in range(number)]
    tokens, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
    return tokens, targets


def made(name: str, pattern: str = "convolution|it") -> tuple[LanguageModel, dict[str, int]]:
    """The model, and the sizes of the mixer that differ from those of conf/mixer."""
    target = get_class(str(with_sizes(name, {})[0]["_target_"]))
    settings, changed = with_sizes(name, {**small_sizes(target), **SIZES, **HEADS})
    mixers = {"convolution": partial(GatedShortConvolution), "it": instantiate(settings, _convert_="all")}
    model = LanguageModel(
        vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, pattern=[pattern], initial_std=0.1, tied_embeddings=True,
        mixers={part: mixers[part] for part in pattern.split("|")}, feed_forward=partial(SwiGLU, hidden=128),
    )  # fmt: skip
    model.initialise(0)
    return model, changed


@torch.no_grad()
def accuracy(model: LanguageModel, task: RecallTask) -> float:
    """The share of held-out queries whose value is the likeliest token."""
    tokens, targets = problems(task, "validation", 0, HELD_OUT)
    _, count, correct = model(tokens, Sequence.single(Documents.whole(*tokens.shape)), targets, correct=True)
    return float(correct / count)


@torch.no_grad()
def state_bytes(name: str) -> int:
    """What decoding keeps of a problem for the mixers of both layers."""
    cache, model = DecodingCache(), made(name, "it")[0]
    model(problems(TASK, "validation", 0, 1)[0], Sequence.decoding(cache, 1, TASK.length))
    return sum(kept_bytes(each) for each in (cache, *(cache.of(part) for part in ("mixer", "feed_forward"))))


def kept_bytes(cache: DecodingCache) -> int:
    rows = sum(of.kept * sum(x[0, 0].numel() * x.element_size() for x in of.tensors) for of in cache.rows.values())
    return rows + sum(x.numel() * x.element_size() for x in cache.states.values())


def train(name: str, steps: int) -> dict[str, Any]:
    """Trains one mixer, for at most so many steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    model, changed = made(name)
    kept = state_bytes(name)
    of_layers = [weight for layer in model.blocks.modules() for weight in layer.parameters(recurse=False)]
    matrices = [weight for weight in of_layers if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    stage, step, best, improved = 0, 0, 0.0, 0
    while step < steps and stage < len(STAGES) and step - improved < PATIENCE:
        task = STAGES[stage]
        tokens, targets = problems(task, "train", step * ROWS, ROWS)
        loss, count = model(tokens, Sequence.single(Documents.whole(*tokens.shape)), targets)
        model.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % EVERY == 0 or step == steps:
            recalled = accuracy(model, task)
            if recalled >= best + 0.01:
                best, improved = recalled, step
            if recalled >= (ENOUGH if task is TASK else GO_ON):
                stage, best, improved = stage + 1, 0.0, step
            told = f"{name}, step {step}, {task.pairs} pairs: loss {loss / count:.2f}, {recalled:.1%}"
            print(told, file=sys.stderr, flush=True)
    return {
        "accuracy": accuracy(model, TASK), "steps": step, "limit": steps, "state": kept, "changed": changed,
        "pairs": STAGES[min(stage, len(STAGES) - 1)].pairs,
        "seconds": time.process_time() - start, "parameters": model.parameter_count(),
    }  # fmt: skip


def result(name: str, steps: int, runs: Path) -> dict[str, Any]:
    """That of a mixer: from the folder of runs, or from a process of its own."""
    file = runs / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else None
    if found is None or found["limit"] != steps:
        command = [sys.executable, str(Path(__file__).resolve()), "--train", name, "--steps", str(steps)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        file.write_text(ran.stdout.splitlines()[-1] + "\n")
        found = json.loads(file.read_text())
    print(f"{name}: {found['accuracy']:.1%} after {found['steps']} steps, {found['seconds']:.0f} s", flush=True)
    return found


def row(name: str, found: dict[str, Any]) -> str:
    sizes = ", ".join(f"{size} {value}" for size, value in found["changed"].items())
    cells = name, f"{found['accuracy']:.1%}", found["pairs"], found["steps"], f"{found['state'] / 1024:,.1f} KiB"
    return f"| {' | '.join(map(str, (*cells, format(found['parameters'], ','), sizes)))} |"


def main() -> None:
    names = standing_alone()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/recall_mixers"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--train", choices=names, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.train:
        print(json.dumps(train(chosen.train, chosen.steps)))
        return
    runs = chosen.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        results = list(pool.map(lambda name: result(name, chosen.steps, runs), chosen.mixers))
    ordered = sorted(
        zip(chosen.mixers, results, strict=True), key=lambda pair: (-pair[1]["pairs"], -pair[1]["accuracy"])
    )
    head = "| mixer | recalled | pairs | steps | state | parameters | sizes other than in conf/mixer |"
    table = "\n".join([head, "|---" * 7 + "|", *(row(*pair) for pair in ordered)])
    print(table)
    if chosen.write:
        told = (
            f"Two layers of width {WIDTH}, each a gated short convolution and one mixer; {ROWS} problems a step, at "
            f"most {chosen.steps} steps: 2 pairs in 32 tokens until 90 % of held-out queries are recalled, then 4 in "
            f"64, 8 in 128, and {TASK.pairs} in {TASK.length} until 99 % are; {PATIENCE} steps without progress end "
            f"it. Recalled: of {TASK.pairs} pairs, in the end (guessing: {1 / TASK.values:.1%}). Pairs: of the "
            "problems that training had come to. State: what decoding keeps of a problem for the mixers of both "
            "layers, in float32. One seed and one learning rate: a mixer that has not come far learns slower here; "
            "that it cannot learn is not shown."
        )
        made_by = f"`python benchmarks/learning/recall_mixers.py --write`, {machine('cpu')}"
        PAGE.write_text(f"# Recall by mixers\n\n{made_by}\n\n{told}\n\n{table}\n")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
