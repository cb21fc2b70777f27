"""Multi-query associative recall (arXiv 2312.04927) by every mixer: who recalls what with which state.

    python benchmarks/recall_mixers.py [--mixers retnet mamba2 …] [--steps 400] [--jobs 2] [--runs runs/recall_mixers]
                                       [--write]

Problems of 256 tokens with 16 pairs and 64 queries, for a model of two layers of width 64 that has this mixer alone,
with the settings of conf/mixer but for the sizes named in the table. Training ends when 99 % of held-out queries are
recalled. Results are kept in the folder of the runs, and a mixer that has one with as many steps is not trained again.
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
from mixers import CONF, HERE, with_sizes
from torch import Tensor

from kernels import machine
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import small_sizes
from longreach.parallel.sequence import DecodingCache, Sequence
from longreach.trainer.data.recall import RecallTask

RESULTS = HERE / "results" / "recall_mixers_cpu.md"
WIDTH, DEPTH, LENGTH, PAIRS, QUERIES, VOCABULARY = 64, 2, 256, 16, 64, 256
ROWS, HELD_OUT, EVERY, ENOUGH = 16, 32, 20, 0.99
TASK = RecallTask(LENGTH, PAIRS, QUERIES, VOCABULARY, power=1.0)
HEADS = {"heads": 2, "kv_heads": 2, "key_heads": 2}
SIZES = {"head_dim": 32, "key_dim": 32, "value_dim": 32, "state": 16, "gate_rank": 16, "window": 64}
RATE, WARM_UP = 3e-3, 20


def problems(split: str, first: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[number, 256]`."""
    found = [TASK.problem(split, first + index) for index in range(number)]
    tokens, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
    return tokens, targets


def made(name: str) -> tuple[LanguageModel, dict[str, int]]:
    """The model, and the sizes of the mixer that differ from those of conf/mixer."""
    target = get_class(str(with_sizes(name, {})[0]["_target_"]))
    settings, changed = with_sizes(name, {**small_sizes(target), **SIZES, **HEADS})
    model = LanguageModel(
        vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, pattern=["it"], initial_std=0.1, tied_embeddings=True,
        mixers={"it": instantiate(settings, _convert_="all")}, feed_forward=partial(SwiGLU, hidden=128),
    )  # fmt: skip
    model.initialise(0)
    return model, changed


@torch.no_grad()
def accuracy(model: LanguageModel) -> float:
    """The share of held-out queries whose value is the likeliest token."""
    tokens, targets = problems("validation", 0, HELD_OUT)
    _, count, correct = model(tokens, Sequence.single(Documents.whole(*tokens.shape)), targets, correct=True)
    return float(correct / count)


@torch.no_grad()
def state_bytes(model: LanguageModel) -> int:
    """What decoding keeps of a problem, in all layers."""
    cache = DecodingCache()
    model(problems("validation", 0, 1)[0], Sequence.decoding(cache, 1, LENGTH))
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
    kept = state_bytes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    seq, best, step = Sequence.single(Documents.whole(ROWS, LENGTH)), 0.0, 0
    while step < steps and best < ENOUGH:
        for group in optimizer.param_groups:  # the last fifth of the steps lowers the rate to a tenth
            left = (steps - step) / (0.2 * steps)
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, max(0.1, left))
        tokens, targets = problems("train", step * ROWS, ROWS)
        loss, count = model(tokens, seq, targets)
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % EVERY == 0 or step == steps:
            best = max(best, accuracy(model))
            print(f"{name}, step {step}: loss {loss / count:.2f}, {best:.1%}", file=sys.stderr, flush=True)
    return {
        "accuracy": best, "steps": step, "limit": steps, "state": kept, "changed": changed,
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
    cells = name, f"{found['accuracy']:.1%}", str(found["steps"]), f"{found['state'] / 1024:,.1f} KiB"
    return f"| {' | '.join((*cells, format(found['parameters'], ','), sizes))} |"


def main() -> None:
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=400)
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
        zip(chosen.mixers, results, strict=True), key=lambda pair: (-pair[1]["accuracy"], pair[1]["steps"])
    )
    head = "| mixer | recalled | steps | state | parameters | sizes other than in conf/mixer |"
    table = "\n".join([head, "|---" * 6 + "|", *(row(*pair) for pair in ordered)])
    print(table)
    if chosen.write:
        told = (
            f"Two layers of width {WIDTH} with one mixer; problems of {LENGTH} tokens, {PAIRS} pairs and {QUERIES} "
            f"queries; {ROWS} a step, at most {chosen.steps} steps. The share of held-out queries that are recalled at "
            "best, after how many steps (fewer: all were recalled), and what decoding keeps of a problem in both "
            f"layers, in float32. Guessing recalls {1 / TASK.values:.1%}."
        )
        made_by = f"`python benchmarks/recall_mixers.py --write`, {machine('cpu')}"
        RESULTS.write_text(f"# Recall by mixers\n\n{made_by}\n\n{told}\n\n{table}\n")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
