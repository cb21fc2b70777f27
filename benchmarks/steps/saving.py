"""What saving costs training on this machine: how long it waits for a checkpoint, and how much a step beside it slows.

    python benchmarks/steps/saving.py [--ranks 1] [--steps 24] [--width 512] [--depth 8] [--length 1024]

One run saves every other step with checkpoint.asynchronous=true, one with false. Steps that a checkpoint is written
beside alternate with steps without, so that both see the same machine; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
WARM_UP = 4  # steps
TIMES = """
import json
import time

from longreach.trainer.callback import Callback


class Times(Callback):
    def __init__(self):
        self.begun, self.times = 0.0, {}

    def before_step(self, trainer):
        self.begun = time.perf_counter()

    def after_step(self, trainer):  # after the built-in callbacks, saving among them
        whole, begun = time.perf_counter() - self.begun, time.perf_counter()
        if trainer.step % 2:  # a checkpoint was written beside it, unless it has been waited for
            trainer.saving.wait(trainer)
        self.times[trainer.step] = [whole, time.perf_counter() - begun]

    def close(self):
        with open("times.json", "w") as file:
            json.dump(self.times, file)
"""


def measure(options: argparse.Namespace, asynchronous: bool) -> None:
    """Trains, saving after every other step, and prints what that has cost."""
    overrides = [
        "model=llama_tiny", f"model.width={options.width}", f"model.depth={options.depth}", "data=recall",
        f"data.sequence_length={options.length}", f"data.rows_per_step={options.ranks}", "evaluation.every=0",
        "evaluation.sample_tokens=0", "logger.wandb.mode=disabled", f"trainer.steps={options.steps}",
        "checkpoint.every=2", f"checkpoint.asynchronous={str(asynchronous).lower()}", "run.dir=run",
        "+callbacks.times._target_=times.Times",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        imports = Path(folder, "imports")
        imports.mkdir()
        (imports / "longreach").symlink_to(HERE)
        Path(folder, "times.py").write_text(TIMES)
        environment = {**os.environ, "PYTHONPATH": str(imports), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *(launcher if options.ranks > 1 else ()), "-m", "longreach.launch.train", *overrides]
        ran = subprocess.run(
            command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if ran.returncode:
            raise SystemExit(f"{' '.join(command)}\n{ran.stdout[-3000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        seconds = {line["step"]: line["seconds"] for line in lines if "loss" in line}
        whole = {int(step): times for step, times in json.loads(Path(folder, "times.json").read_text()).items()}
        newest = max(Path(folder, "run", "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    steps = [step for step in seconds if WARM_UP < step < options.steps]
    plain = statistics.median(seconds[step] for step in steps if step % 2 == 0)
    beside = statistics.median(seconds[step] for step in steps if step % 2)
    stop = statistics.median(whole[step][0] - seconds[step] for step in steps if step % 2 == 0)
    after = statistics.median(whole[step][1] for step in steps if step % 2)
    print(
        f"asynchronous={asynchronous!s:5}  checkpoint {size / 1e6:.0f} MB  training waits {stop:.3f} s  "
        f"step {plain:.3f} s  step after a checkpoint {beside:.3f} s ({beside / plain - 1:+.1%})  "
        f"still writing after it for {after:.3f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 1), ("steps", 24), ("width", 512), ("depth", 8), ("length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for asynchronous in (True, False):
        measure(options, asynchronous)


if __name__ == "__main__":
    main()
