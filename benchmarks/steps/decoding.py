"""Time per token and memory while a model decodes thousands of tokens on a CPU: at the start, and at the end.

    python benchmarks/steps/decoding.py [--models llama_tiny mamba2_hybrid_tiny:mamba2 …] [--tokens 4000]
                                        [--against FOLDER] [--write]

Models of `conf/model` with a vocabulary of 1,024 and random weights, one row, in float32; `model:mixer` has that mixer
in every layer. One thread, whose own time is taken. With layers whose state does not grow, a token takes as long at the
end as at the start. `--against` decodes by another checkout too, token by token in turns, so that both meet the same
load of the machine. `--write` keeps the table in results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from longreach.launch import configuration
from longreach.models.decoding import next_logits
from longreach.models.language_model import LanguageModel
from longreach.parallel.sequence import DecodingCache

HERE = Path(__file__).resolve().parents[2]
MODELS = (
    "minimax_01_tiny:lightning", "mamba2_hybrid_tiny:mamba2", "gated_deltanet_hybrid_tiny:delta",
    "sliding_window_tiny:window", "llama_tiny", "nsa_tiny", "moba_tiny", "infllm_v2_tiny", "minimax_01_tiny",
    "gated_deltanet_hybrid_tiny", "nsa_gated_deltanet_tiny", "rwkv7_hybrid_tiny", "jamba_tiny",
)  # fmt: skip
VOCABULARY = 1024
START = 100  # tokens that are read before the first are timed
TIMED = 50  # tokens that a median is taken over
PIECE = 200  # tokens read at a time on the way to those at the end


def build(name: str) -> LanguageModel:
    preset, _, mixer = name.partition(":")
    with hydra.initialize_config_module(version_base="1.3", config_module="longreach.conf"):
        settings = hydra.compose(f"model/{preset}").model
    OmegaConf.set_struct(settings, False)
    if mixer:
        settings.pattern, settings.mixers = [mixer], {mixer: settings.mixers[mixer]}
    model = instantiate(OmegaConf.merge(settings, {"vocabulary": VOCABULARY}), _convert_="all")
    model.initialise(0)
    return model


def serve(names: list[str], tokens: int) -> None:
    """Decodes one row by each model: for each line that is read a first and a last token, TIMED times.

    A line of the answer has the seconds of both tokens and the bytes of both caches.
    """
    torch.set_num_threads(1)
    configuration.register_sizes()
    for name in names:
        serve_model(build(name), tokens)


def serve_model(model: LanguageModel, tokens: int) -> None:
    """Answers as `serve` says."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    starts = START, tokens - TIMED
    caches = DecodingCache(), DecodingCache()
    for cache, start in zip(caches, starts, strict=True):
        for piece in ids[:, :start].split(PIECE, dim=1):
            next_logits(model, piece, cache)
    for number in range(TIMED):
        sys.stdin.readline()
        seconds = []
        for cache, start in zip(caches, starts, strict=True):
            token = ids[:, start + number :][:, :1]
            begin = time.thread_time()
            next_logits(model, token, cache)
            seconds.append(time.thread_time() - begin)
        print(json.dumps([*seconds, *(cache.bytes for cache in caches)]), flush=True)


def decode(names: list[str], tokens: int, checkouts: list[Path]) -> Iterator[list[list[float]]]:
    """By model, for each checkout the median seconds of a first and of a last token, and the bytes of the caches."""
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number, checkout in enumerate(checkouts):
            package = Path(folder, str(number), "longreach")
            package.parent.mkdir()
            package.symlink_to(checkout.resolve())
            path = {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}
            command = [sys.executable, __file__, "--serve", "--tokens", str(tokens), "--models", *names]
            workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}
                )
            )
        for _ in names:
            answers: list[list[list[float]]] = [[] for _ in workers]
            for _ in range(TIMED):
                for worker, answered in zip(workers, answers, strict=True):
                    assert worker.stdin is not None
                    assert worker.stdout is not None
                    print(file=worker.stdin, flush=True)
                    answered.append(json.loads(worker.stdout.readline()))
            yield [[*map(statistics.median, list(zip(*each, strict=True))[:2]), *each[-1][2:]] for each in answers]
        for worker in workers:
            worker.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--against", type=Path, help="another checkout, say a worktree of an earlier commit")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.models, arguments.tokens)
        return
    from longreach.benchmarks.machine import RESULTS, machine  # the worker of another checkout may find none there

    torch.set_num_threads(1)
    against = [arguments.against] if arguments.against else []
    columns = ["model", "start", "end", "end / start", "cache at the start", "at the end"]
    columns += ["start before", "end before", "start / before", "end / before"] if against else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    decoded = decode(arguments.models, arguments.tokens, [HERE, *against])
    for name, ((start, end, start_bytes, end_bytes), *before) in zip(arguments.models, decoded, strict=True):
        cells = [name, f"{start * 1e3:.2f} ms", f"{end * 1e3:.2f} ms", f"{end / start:.2f}"]
        cells += [f"{start_bytes / 2**10:,.0f} KiB", f"{end_bytes / 2**10:,.0f} KiB"]
        for first, last, *_ in before:
            cells += [f"{first * 1e3:.2f} ms", f"{last * 1e3:.2f} ms", f"{start / first:.2f}", f"{end / last:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    text = (
        f"{machine('cpu')}\n\nDecoding one row, token by token: median time per token and size of the cache for tokens "
        f"{START} to {START + TIMED} and {arguments.tokens - TIMED:,} to {arguments.tokens:,}, timed in turns.\n"
    )
    told = [f"--tokens {arguments.tokens}"] if arguments.tokens != 4000 else []
    command = ["python benchmarks/steps/decoding.py", *told]
    if against:
        commit = subprocess.run(
            ["git", "-C", arguments.against, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        text += f"Before is commit {commit}, by a process of its own that decodes the same tokens in turns.\n"
        command.append(f"--against FOLDER (a checkout of {commit})")
    text += "\n" + "\n".join(lines) + "\n"
    print("\n" + text)
    if arguments.write:
        path = RESULTS / "decoding_cpu.md"
        path.write_text(f"# Decoding on a CPU\n\n`{' '.join([*command, '--write'])}`, {text}")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
