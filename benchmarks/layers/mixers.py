"""One layer of every mixer on a CPU, forward + backward: tokens per second and peak memory, at two lengths.

    python benchmarks/layers/mixers.py [--mixers retnet mamba2 …] [--lengths 2048 16384] [--write]

Settings are those of conf/mixer with at most 4 heads, in a model of width 256, in float32 on one thread, whose own time
is taken: of steps on short and long rows in turns, as many tokens of each, while glibc keeps freed memory. A peak is
that of a process of its own.
`--write` keeps the table in benchmarks/results/; with `--mixers` it replaces their rows and leaves the others.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from longreach.benchmarks.machine import CHECKOUT, RESULTS, keep_memory, machine, peak_bytes
from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixer import Mixer
from longreach.parallel.sequence import Sequence

PAGE = RESULTS / "mixers_cpu.md"
CONF = CHECKOUT / "conf" / "mixer"
WIDTH, SIZES = 256, {"heads": 4, "kv_heads": 2, "key_heads": 2}
ROUNDS = 3


def standing_alone() -> list[str]:
    """The mixers of conf/mixer that read nothing that another part would have to publish, by name."""
    found = []
    for path in sorted(CONF.glob("*.yaml")):
        settings = OmegaConf.load(path)
        reads = "keys_of" in settings or "memory_of" in settings
        found += [] if reads or not issubclass(get_class(settings["_target_"]), Mixer) else [path.stem]
    return found


def with_sizes(name: str, sizes: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a mixer of conf/mixer, none of `sizes` larger than it says there, and those that this changed."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))  # type: ignore[assignment]
    known, changed = inspect.signature(get_class(settings["_target_"])).parameters, {}
    for each, most in sizes.items():
        value = settings.get(each, known[each].default if each in known else None)
        if type(value) is int and value > most:
            changed[each] = most
    return {**settings, **changed}, changed


def layer(name: str, length: int) -> Mixer:
    """The mixer with few heads in a model of one layer for rows of `length`, with the values that a run begins with."""
    settings, _ = with_sizes(name, SIZES)
    if "max_length" in settings:
        settings["max_length"] = max(length, settings["max_length"])
    mixers = {"it": instantiate(settings, _convert_="all")}
    feed_forward = partial(SwiGLU, hidden=8)
    model = LanguageModel(vocabulary=2, width=WIDTH, depth=1, pattern=["it"], mixers=mixers, feed_forward=feed_forward)
    model.initialise(0)
    made = model.mixers[0]
    assert isinstance(made, Mixer)
    return made


def step(name: str, length: int) -> Callable[[], None]:
    """Forward + backward on one row of `length` tokens, which is one document."""
    torch.manual_seed(0)
    mixer, seq = layer(name, length), Sequence.single(Documents.whole(1, length))
    x = torch.randn(1, length, WIDTH, requires_grad=True)

    def run() -> None:
        mixer.zero_grad(set_to_none=True)
        x.grad = None
        out = mixer(x, seq, *(x.detach() for _ in mixer.reads))
        (out[0] if mixer.publishes else out).sum().backward()

    return run


def measure(name: str, lengths: list[int]) -> list[float]:
    """The bytes of a step on a row of one length, or the median seconds of steps on several, timed in turns."""
    torch.set_num_threads(1)
    if len(lengths) > 1:
        keep_memory()
    steps = [step(name, length) for length in lengths]
    for run in steps:
        run()
    if len(steps) == 1:
        return [peak_bytes(steps[0], "cpu")]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for run, length, found in zip(steps, lengths, seconds, strict=True):
            times, start = max(lengths) // length, time.thread_time()
            for _ in range(times):
                run()
            found.append((time.thread_time() - start) / times)
    return [statistics.median(found) for found in seconds]


def measured(name: str, lengths: list[int]) -> str:
    """The row of a mixer."""

    def in_a_process(*lengths: int) -> list[float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, *map(str, lengths)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(ran.stdout.splitlines()[-1])

    of_token = [seconds / length for seconds, length in zip(in_a_process(*lengths), lengths, strict=True)]
    peaks = [in_a_process(length)[0] for length in lengths]
    cells = [f"{1 / each:,.0f} | {peak / 2**20:,.0f} MiB" for each, peak in zip(of_token, peaks, strict=True)]
    return f"| {name} | {' | '.join(cells)} | {of_token[-1] / of_token[0]:.2f} |"


def rows_kept() -> dict[str, str]:
    """The rows of the last table, by mixer."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return {found[1]: found[0] for found in re.finditer(r"^\| (\w+) \| [\d,]+ \|.*$", text, re.MULTILINE)}


def main() -> None:
    names = standing_alone()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=names, default=names)
    parser.add_argument("--lengths", nargs=2, type=int, default=[2048, 16384])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure[0], [int(length) for length in chosen.measure[1:]])))
        return
    short, long = (f"{length:,}" for length in chosen.lengths)
    head = f"| mixer | tokens/s at {short} | peak | tokens/s at {long} | peak | time per token, {long} to {short} |"
    if chosen.write and chosen.mixers != names and PAGE.exists() and head not in PAGE.read_text():
        parser.error(f"--lengths must be those of {PAGE.name} for --write with --mixers; got {short} and {long}")
    lines = [head, "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    rows = {}
    for name in chosen.mixers:
        rows[name] = measured(name, chosen.lengths)
        print(rows[name], flush=True)
    if chosen.write:
        rows = {name: row for name, row in sorted((rows_kept() | rows).items()) if name in names}
        told = (
            f"Forward + backward of one layer in a model of width {WIDTH}, float32: tokens per second, peak memory "
            "beyond what was there before, and how much longer a token takes in the longer row."
        )
        table = "\n".join([*lines, *rows.values()])
        made_by = f"`python benchmarks/layers/mixers.py --write`, {machine('cpu')}"
        PAGE.write_text(f"# Mixers on a CPU\n\n{made_by}\n\n{told}\n\n{table}\n")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
