"""Steps of the trainer itself on a CPU, by preset, ranks and documents per row; or beside another checkout.

    python benchmarks/steps/step.py [--models minimax_01_tiny gated_deltanet_hybrid_tiny] [--ranks 1 2]
                                    [--documents 1 5000] [--length 16384] [--steps 3] [--rounds 5] [--against CHECKOUT]

Each measurement is a training run of its own by the command line, in float32, one thread per rank, on text of one byte
per token; ranks share the row. Its first two steps are left out, and a figure is the median of the steps of all rounds.
With --against every run is followed by the same one of the other checkout, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
WARM_UP = 2  # steps


def write_documents(path: Path, documents: int, length: int) -> None:
    """Lines of text such that a row of `length` tokens holds about so many documents; each ends in one token more."""
    generator = random.Random(0)
    size = max(1, round(length / documents) - 1)
    # Enough for several rows, and none of them held out by much.
    with path.open("w") as file:
        for _ in range(max(40, 8 * documents)):
            text = "".join(generator.choices("abcdefghij klmnop", k=size))
            file.write(json.dumps({"text": text}) + "\n")


def importable(checkout: Path, folder: Path) -> Path:
    """A folder from which Python imports a checkout as `longreach`."""
    folder.mkdir()
    (folder / "longreach").symlink_to(checkout)
    return folder


def step_seconds(path: Path, ranks: int, overrides: list[str]) -> list[float]:
    """The time of each step of a run, without the first ones, with `longreach` imported from `path`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, "-m", "longreach.launch.train", *overrides, f"run.dir={folder}/run"]
        ran = subprocess.run(
            command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if ran.returncode:
            raise SystemExit(f"{' '.join(command)}\n{ran.stdout[-3000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "loss" in line][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minimax_01_tiny", "gated_deltanet_hybrid_tiny"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 5000])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path)
    chosen = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="step-"))
    checkouts = {"this": importable(HERE, work / "this")}
    if chosen.against is not None:
        checkouts["other"] = importable(chosen.against.resolve(), work / "other")
    head = "".join(f" {name} checkout |" for name in checkouts) + (" ratio |" if len(checkouts) > 1 else "")
    print(f"| model | ranks | documents per row |{head}\n|{'---|' * (3 + head.count('|'))}", flush=True)
    for documents in chosen.documents:
        write_documents(work / f"{documents}.jsonl", documents, chosen.length)
        for model in chosen.models:
            for ranks in chosen.ranks:
                overrides = [
                    f"model={model}", "data=jsonl", f"data.path={work / f'{documents}.jsonl'}", "data.tokenizer=bytes",
                    f"data.cache_dir={work / 'cache'}", f"data.sequence_length={chosen.length}", "data.rows_per_step=1",
                    f"trainer.steps={WARM_UP + chosen.steps}", f"parallel.sequence={ranks}", "evaluation.every=0",
                    "evaluation.sample_tokens=0", "checkpoint.every=0", "logger=files", "schedule.warmup_steps=1",
                ]  # fmt: skip
                seconds: dict[str, list[float]] = {name: [] for name in checkouts}
                for _ in range(chosen.rounds):
                    for name, path in checkouts.items():
                        seconds[name] += step_seconds(path, ranks, overrides)
                medians = [statistics.median(of) for of in seconds.values()]
                cells = [f"{median:.3f} s" for median in medians]
                cells += [f"{medians[0] / medians[1]:.2f}"] if len(medians) > 1 else []
                print(f"| {model} | {ranks} | {documents:,} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
