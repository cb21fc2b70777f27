"""Needles in a haystack by depth, length and checkpoint, of a small hybrid that learns them: docs/evaluation.md.

    python benchmarks/learning/needles.py [--run runs/needles] [--write] [SETTING=VALUE …]

Writes texts of up to 512 bytes, trains on them and on Python's standard library, one process on one core, and scores
the checkpoints on other problems, of up to eight times the length. Settings at the end change the run. What is
finished in that folder is not done again. `--write` keeps the maps in docs/.

The texts are a curriculum: strings that repeat themselves, in which a byte tells the next one; words and numbers that
are listed and then asked for in other orders; and problems of the tasks. From problems alone, of which few bytes can be
known, such a model learns nothing in so many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.evaluation.tasks.drawing import Draw
from longreach.trainer.evaluation.tasks.needles import Needles, PassKey
from longreach.trainer.evaluation.tasks.task import Material

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXTS, LENGTH = 8000, 512
SEED = 1  # of the texts; the problems that are scored are of seed 0
TASKS = (Needles(), Needles(keys=2, queries=2), Needles(keys=3, queries=3), PassKey())
CHARACTERS = [chr(code) for code in range(33, 127)]
STEPS, EVERY = 500, 50
SETTINGS = (
    "model=quickstart", "model.width=128", "model.depth=2", "model.pattern=[lightning,softmax]",
    "model.mixers.lightning.heads=4", "model.mixers.softmax.heads=2", "model.mixers.softmax.kv_heads=2",
    "+model.mixers.softmax.rope_base=null", "model.feed_forward.hidden=256", "data=mixture", "data.packing=best_fit",
    "data.tokenizer=bytes", f"data.sequence_length={LENGTH}", "data.rows_per_step=8", "data.rows_per_micro_batch=8",
    "optimizer=muon", "optimizer.learning_rate=1e-2", "optimizer.momentum=0.9", "schedule=wsd",
    f"trainer.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=9", f"evaluation.every={EVERY}",
    "evaluation.rows=16", "evaluation.sample_tokens=0", "logger.print_every=25", "logger.wandb.mode=disabled",
)  # fmt: skip


def texts() -> list[str]:
    tokenizer = byte_tokenizer()
    material, drawn = Material(tokenizer.vocabulary_size, SEED, tokenizer), np.random.default_rng(SEED)
    made = []
    for number in range(TEXTS):
        if number % 3 < 2:
            made.append((repeated, listed)[number % 3](number))
            continue
        task = TASKS[number // 3 % len(TASKS)]
        least = task.least(material, number)
        length = int(drawn.integers(least, max(least + 1, LENGTH)))
        problem = task.problem(material, length, number, float(drawn.random()))
        made.append(tokenizer.decode(problem.tokens))
    return made


def repeated(number: int) -> str:
    """Some characters in a drawn order, again and again."""
    draw = Draw(SEED, "repeated", number)
    count = 8 + draw.one(60)
    text = "".join(CHARACTERS[place] for place in draw.permutation(len(CHARACTERS))[:count])
    return (text * 32)[:250]


def listed(number: int) -> str:
    """Words with a number each, in three orders."""
    draw = Draw(SEED, "listed", number)
    count = 2 + draw.one(6)
    lines = [f" {word} is: {1000000 + draw.one(9000000)}.\n" for word in draw.words(count)]
    again = [[lines[place] for place in draw.permutation(count)] for _ in range(2)]
    return "".join(lines + again[0] + again[1])


def run(module: str, *settings: str) -> None:
    command = ["-m", f"longreach.launch.{module}", *settings]
    print("python", shlex.join(command), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, *command], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/needles"))
    parser.add_argument("--write", action="store_true")
    given, more = parser.parse_known_args()
    folder = given.run.resolve()
    file, trained, checkpoints = folder / "texts.jsonl", folder / "run", folder / "run" / "checkpoints"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    if not (checkpoints / f"step-{STEPS:08}").is_dir():
        sources = f"{{text: {{source: stdlib, weight: 1}}, problems: {{source: jsonl, path: {file}, weight: 7}}}}"
        run("train", *SETTINGS, f"data.mixture={sources}", f"run.dir={trained}", *more)
    tasks, lengths = "tasks=[needle,needle_multikey,passkey]", "lengths=[512,1024,2048,4096]"
    if not (folder / "depths" / "metrics.jsonl").is_file():
        run("evaluate", f"checkpoint={trained}", tasks, lengths, "problems=6", f"path={folder / 'depths'}")
    steps = ",".join(map(str, sorted(checkpoints.glob("step-*"))))
    tasks = "tasks=[passkey,needle,needle_multikey,needle_multivalue,needle_multiquery]"
    if not (folder / "course" / "metrics.jsonl").is_file():
        of_all = (f"checkpoints=[{steps}]", tasks, f"lengths=[{LENGTH}]", "problems=8", "rows_at_once=8")
        run("evaluate", *of_all, f"path={folder / 'course'}")
    if given.write:
        for name, found in (("needles_by_depth", "depths/plots/needle"), ("needles", "course/plots/checkpoints")):
            shutil.copy(folder / f"{found}.png", DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
