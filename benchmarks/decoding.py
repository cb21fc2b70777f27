"""Time per token and memory while a model decodes thousands of tokens on a CPU: at the start, and at the end.

    python benchmarks/decoding.py [--models llama_tiny mamba2_tiny:mamba2 …] [--tokens 4000] [--write]

Models of `conf/model` with a vocabulary of 1,024 and random weights, one row, in float32; `model:mixer` has that mixer
in every layer. One thread, whose own time is taken. With layers whose state does not grow, a token takes as long at the
end as at the start. `--write` keeps the table in results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kernels import machine
from longreach.launch import configuration
from longreach.models.decoding import next_logits
from longreach.models.language_model import LanguageModel
from longreach.parallel.sequence import DecodingCache

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "minimax_01_tiny:lightning", "mamba2_tiny:mamba2", "gated_deltanet_hybrid_tiny:delta", "sliding_window_tiny:window",
    "llama_tiny", "nsa_tiny", "moba_tiny", "minimax_01_tiny", "gated_deltanet_hybrid_tiny",
)  # fmt: skip
VOCABULARY = 1024
START = 100  # tokens that are read before the first are timed
TIMED = 200  # tokens that a median is taken over
PIECE = 200  # tokens read at a time on the way to those at the end


class Decoded(NamedTuple):
    """Median seconds per token, and bytes of the cache, at the start and at the end."""

    start: float
    end: float
    start_bytes: int
    end_bytes: int


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


def decode(model: LanguageModel, tokens: int) -> Decoded:
    """Decodes the first and the last tokens of one row, in turns, so that both meet the same load of the machine."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    starts = START, tokens - TIMED
    caches = DecodingCache(), DecodingCache()
    for cache, start in zip(caches, starts, strict=True):
        for piece in ids[:, :start].split(PIECE, dim=1):
            next_logits(model, piece, cache)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(TIMED):
        for cache, start, took in zip(caches, starts, seconds, strict=True):
            token = ids[:, start + number :][:, :1]
            begin = time.thread_time()
            next_logits(model, token, cache)
            took.append(time.thread_time() - begin)
    first, last = map(statistics.median, seconds)
    return Decoded(first, last, caches[0].bytes, caches[1].bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configuration.register_sizes()
    lines = ["| model | start | end | end / start | cache at the start | at the end |", "|---" * 6 + "|"]
    for name in arguments.models:
        done = decode(build(name), arguments.tokens)
        lines.append(
            f"| {name} | {done.start * 1e3:.2f} ms | {done.end * 1e3:.2f} ms | {done.end / done.start:.2f} | "
            f"{done.start_bytes / 2**10:,.0f} KiB | {done.end_bytes / 2**10:,.0f} KiB |"
        )
        print(lines[-1], flush=True)
    text = (
        f"{machine('cpu')}\n\nDecoding one row, token by token: median time per token and size of the cache for tokens "
        f"{START} to {START + TIMED} and {arguments.tokens - TIMED:,} to {arguments.tokens:,}, timed in turns.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print("\n" + text)
    if arguments.write:
        path = RESULTS / "decoding_cpu.md"
        path.write_text(f"# Decoding on a CPU\n\n`python benchmarks/decoding.py --write`, {text}")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
