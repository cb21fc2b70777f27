"""Training: models in rows of 131,072 tokens through the real trainer, what their steps take, and compiled ones."""

from __future__ import annotations

import gzip
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...parallel.mesh import Mesh
from .step import Here, Step

# On a GPU, and on a CPU in its place.
MODELS = (
    (("model=minimax_01_125m",), ("model=minimax_01_tiny",)),
    (("model=llama_125m",), ("model=llama_tiny", "model.depth=2")),
    (("model=gated_deltanet_hybrid_125m",), ("model=gated_deltanet_hybrid_tiny", "model.depth=4")),
    (("model=nsa_1b", "model.depth=1"), ("model=nsa_tiny", "model.depth=1")),
)
COMPARED = MODELS[0]  # with trainer.compile
STEPS, EVERY = (
    7,
    3,
)  # steps of a run, and of a log interval: the first compiles, the second counts, the rest is profiled
LENGTH, FEW = 131072, 128
FILES, FILE_BYTES = 6, 900_000  # text in files that are longer than a row
LONGEST = 10  # kernels of a profile that are shown
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace


def steps(here: Here) -> list[Step]:
    from ...trainer.trainer import Trainer  # noqa: F401 (where DeepSpeed is missing, that is said instead)
    from ..train import to_settings  # noqa: F401 (the same of Hydra)

    found = [Step(shown_name(_model(model, here)), partial(_measure, model)) for model in MODELS]
    name = shown_name(_model(COMPARED, here))
    found.append(Step(f"{name}, compiled", _compare))
    return [*found, Step("gradients of compiled parts", _bisect)]


def _model(model: tuple[tuple[str, ...], tuple[str, ...]], here: Here) -> tuple[str, ...]:
    return model[0] if here.on_gpu else model[1]


def shown_name(overrides: tuple[str, ...]) -> str:
    """The overrides of a model as the report names them."""
    first, *rest = overrides
    return " ".join([first.removeprefix("model="), *rest])


def _measure(model: tuple[tuple[str, ...], tuple[str, ...]], here: Here) -> None:
    """Trains some steps; a row of what they took, and one for each of the kernels that took longest."""
    overrides = _model(model, here)
    run = _train(overrides, here, f"trainer.profile_start={STEPS}", "trainer.profile_steps=1")
    records = records_of(run)
    timed = next(record for record in records if record["step"] == 2 * EVERY)  # with the mean of its interval
    memory = max(record["peak_memory_bytes"] for record in records) / 1e9
    mfu, length = timed["mfu"], LENGTH if here.on_gpu else FEW
    here.row(
        f"Steps {EVERY + 1} to {2 * EVERY}, one row of {length:,} tokens each, in bfloat16: the mean",
        **{"model": shown_name(overrides), "tokens/s": timed["tokens_per_second"]},
        **{"MFU": None if mfu is None else f"{mfu:.1%}", "seconds a step": timed["seconds"]},
        **{"peak GB": memory, "losses": _losses(records)},
    )
    longest, total = longest_kernels(run / "profile" / "rank-0.json.gz")
    if not longest:
        here.skip(f"the longest kernels of {shown_name(overrides)}", "no kernel of a GPU ran")
    for name, calls, taken in longest:
        here.row(
            f"The {LONGEST} longest kernels of a step of {shown_name(overrides)}, of {total * 1e3:.0f} ms of kernels",
            kernel=name[:90],
            calls=calls,
            ms=taken * 1e3,
            share=f"{taken / total:.1%}",
        )


def _compare(here: Here) -> None:
    """The same steps with trainer.compile, and the losses beside those of the run before."""
    overrides = _model(COMPARED, here)
    if not here.on_gpu:
        here.skip(here.step, "the compiler takes minutes on a CPU")
        return
    before = run_folder(overrides, here)
    plain = before if (before / "metrics.jsonl").exists() else _train(overrides, here)
    compiled = _train(overrides, here, "trainer.compile=true")
    for a, b in zip(records_of(plain), records_of(compiled), strict=False):
        here.row(
            f"Losses of {shown_name(overrides)}, compiled and not",
            **{"step": a["step"], "not compiled": f"{a['loss']:.5f}", "compiled": f"{b['loss']:.5f}"},
            **{"difference": b["loss"] - a["loss"], "norm, not compiled": f"{a['grad_norm']:.5f}"},
            **{"norm, compiled": f"{b['grad_norm']:.5f}", "seconds": a["seconds"], "seconds, compiled": b["seconds"]},
        )


def _bisect(here: Here) -> None:
    from .compiled import compare_gradients

    name = COMPARED[0] if here.on_gpu else COMPARED[1]
    compare_gradients(composed(("model.vocabulary=512", *name)).model, here)


def run_folder(overrides: tuple[str, ...], here: Here, *more: str) -> Path:
    name = "-".join([*overrides, *more]).replace("=", "_").replace("/", "_")
    return here.folder / "runs" / name


def _train(overrides: tuple[str, ...], here: Here, *more: str) -> Path:
    """A run of the trainer in this process, which stays in its process group for the next one; its folder."""
    from ...trainer.ranks import processes
    from ...trainer.trainer import Trainer
    from ..build import build

    folder = run_folder(overrides, here, *(item for item in more if "compile" in item))
    length = LENGTH if here.on_gpu else FEW
    arguments = [
        *overrides, "data=text", f"data.path={_text(here)}", "data.tokenizer=bytes", f"data.sequence_length={length}",
        f"model.vocabulary={32768 if here.on_gpu else 512}", "data.rows_per_step=1", "trainer.dtype=bfloat16",
        f"data.cache_dir={here.folder / 'tokens'}", f"trainer.steps={STEPS}", "evaluation.every=0",
        "evaluation.sample_tokens=0", "checkpoint.every=0", "logger.wandb.mode=disabled", f"logger.every={EVERY}",
        f"run.dir={folder}", *more,
    ]  # fmt: skip
    print(" ".join(["python -m longreach.launch.train", *arguments]), flush=True)
    if here.on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    command = [sys.executable, "-m", "longreach.launch.train", *arguments]
    settings = composed(arguments)
    device = processes.start(deterministic=settings.trainer.deterministic)
    Trainer(settings, build, Mesh.create(1), device, command).run()
    return folder


def composed(arguments: Any) -> Any:
    """The settings of a training run with these overrides."""
    import hydra

    from ..train import to_settings

    with hydra.initialize_config_module("longreach.conf", version_base="1.3"):
        return to_settings(hydra.compose("train", list(arguments)), list(arguments), {"model": "gpu_check"})


def _text(here: Here) -> Path:
    """A folder with files of Python source, each longer than a row, made once."""
    folder = here.folder / "text"
    if folder.is_dir():
        return folder
    folder.mkdir()
    size = FILE_BYTES if here.on_gpu else 8_000
    for number, content in zip(range(FILES), pieces(size), strict=False):
        (folder / f"{number}.txt").write_bytes(content)
    return folder


def pieces(size: int) -> Iterator[bytes]:
    """The source of Python's standard library in pieces of about a size."""
    held, library = b"", Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "idlelib", "site-packages", "dist-packages"} & set(path.parts):
            held += path.read_bytes().decode("utf-8", "ignore").encode()
            if len(held) >= size:
                yield held
                held = b""


def records_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that tell of a step of training."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record and "seconds" in record]


def _losses(records: list[dict[str, Any]]) -> str:
    return " ".join(f"{record['loss']:.3f}" for record in records)


def longest_kernels(trace: Path) -> tuple[list[tuple[str, int, float]], float]:
    """(name, calls, seconds) of the kernels of a profiler's trace that took longest, and the seconds of all."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    seconds, calls = Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") in KERNELS and "dur" in event:
            seconds[event["name"]] += event["dur"] / 1e6
            calls[event["name"]] += 1
    longest = [(name, calls[name], float(taken)) for name, taken in seconds.most_common(LONGEST)]
    return longest, float(sum(seconds.values()))
