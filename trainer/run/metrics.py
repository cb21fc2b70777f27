"""Metrics: the lines of metrics.jsonl, and the meters behind them."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...kernels.documents import PADDING, Documents
from ...parallel.layout import Layout

# Dense peak FLOPs per second by part of the device's name, as its maker publishes it, for matrix multiplies without
# sparsity: (bfloat16, float32 as torch computes it by default, without TF32). The first part that fits counts.
PEAK_FLOPS = {
    "GB200": (2.5e15, 80e12),
    "B200": (2.25e15, 80e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "MI300X": (1307e12, 163e12),
}

# True in the line of a validation with the settings of a stage before its first step: its step has another one, of the
# stage that ends there.
BEFORE_STAGE = "before_stage"


class MetricsFile:
    """One JSON object per line, each line flushed as it is written, so that a kill loses none.

    `resume_at(step)` drops what came after that step, and a line that a kill has torn. Lines that the disk had no room
    for are kept and written with the next one. Numbers that JSON does not have (inf, nan) become null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []

    def resume_at(
        self, step: int, each: Callable[[dict[str, Any]], None] | None = None, beginning: str | None = None
    ) -> None:
        """Keeps the lines up to `step`, and calls `each` with what they say.

        beginning: the stage that begins after `step`; its lines before its first step are written once more. Written
        aside and renamed, so that a kill here loses nothing either.
        """
        if not self.path.exists():
            return
        aside = self.path.with_suffix(".jsonl.partial")
        try:
            with self.path.open(encoding="utf-8") as lines, aside.open("w", encoding="utf-8") as kept:
                for line, record in _records(lines):
                    again = record["step"] == step and beginning and record.get("stage") == beginning
                    if record["step"] <= step and not again:
                        kept.write(line + "\n")
                        if each is not None:
                            each(record)
            os.replace(aside, self.path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line. Raises OSError where it cannot be written yet."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._unwritten.append(json.dumps(finite) + "\n")
        self.flush()

    @property
    def unwritten(self) -> int:
        """Lines that are still to be written."""
        return len(self._unwritten)

    def flush(self) -> None:
        """Writes what could not be written before. Raises OSError where it still cannot be."""
        if not self._unwritten:
            return
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            data = "".join(self._unwritten).encode()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)  # no half line stays
                raise
        self._unwritten.clear()


def _records(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line.rstrip("\n"), record


@dataclass(frozen=True)
class Work:
    """The work in one data-parallel rank's rows of a step; adds up over ranks and micro-batches.

    targets: tokens with a target.                tokens: tokens that are not padding.
    places: tokens and padding together.          flops: forward FLOPs of the model on them, by the ops' own count.
    heaviest, mean: visible causal (query, key) pairs of the busiest sequence rank, and of the average one.
    """

    targets: int = 0
    tokens: int = 0
    places: int = 0
    flops: int = 0
    heaviest: float = 0.0
    mean: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))  # type: ignore[arg-type]

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.targets, self.tokens, self.places, self.flops, self.heaviest, self.mean

    @property
    def padding(self) -> float:
        """The fraction of places that hold no token."""
        return 1 - self.tokens / self.places

    @property
    def imbalance(self) -> float:
        """Attention work of the busiest sequence rank over that of the average one; 1 is even."""
        return self.heaviest / self.mean if self.mean else 1.0


def work_of(documents: Documents, targets: int, layout: Layout, flops: int) -> Work:
    """The work of one micro-batch, from the host's description of its rows alone."""
    pairs = attention_pairs(documents, layout)
    return Work(
        targets, documents.tokens, documents.batch * documents.length, flops, max(pairs), sum(pairs) / len(pairs)
    )


def attention_pairs(documents: Documents, layout: Layout) -> list[int]:
    """Visible pairs of plain causal attention that each sequence rank computes.

    documents: of whole rows, each document one run. One pass over them, however many ranks there are: pairs are summed
    up to every border of a span, and the spans of a rank added.
    """
    borders = np.arange(layout.ranks * layout.spans + 1) * layout.span_length
    pairs = np.zeros(len(borders) - 1, np.int64)
    table = documents.table.numpy()
    for first, last in documents.ends.tolist():
        _, document, start, length, _ = table[first:last].T
        seen = np.where(document == PADDING, 0, 1)
        # Of a run's first n tokens the first sees one key of those held, itself, the next two: n (n + 1) / 2 together.
        before = np.concatenate([[0], np.cumsum(seen * length * (length + 1) // 2)])
        place = np.searchsorted(start, borders, side="right") - 1
        n = borders - start[place]
        pairs += np.diff(before[place] + seen[place] * n * (n + 1) // 2)
    return [int(pairs[list(layout.spans_of(rank))].sum()) for rank in range(layout.ranks)]


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's peak FLOPs per second in `dtype`; None where it is not known, as on every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (bfloat16, float32) in PEAK_FLOPS.items():
        if part in name:
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has used: what torch allocated on CUDA since the last call, on the CPU the
    resident set since the process began.
    """
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
