"""Rewriting: a checkpoint made of another model on the disk, or of its weights in another form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ...models.hf import Entries, new_folder
from ...models.language_model import LanguageModel
from ..engine import saved_buffers
from .source import Source
from .stored import BUFFERS, FORMAT, INDEX, sealed
from .tensor_files import TensorWriter

Shapes = dict[str, tuple[int, ...]]


def rewrite(
    source: Source,
    path: Path,
    model: LanguageModel,
    settings: dict[str, Any],
    weights: Iterable[tuple[str, Tensor | Entries]],
    setting: str = "path",
) -> None:
    """Writes the folder `path`: a checkpoint like `source` with other weights, those of `model`, built from `settings`.

    weights: (name, tensor) of each parameter and then each saved buffer in the order of the model's, taken one at a
    time. It has no moments of the optimizer: training begins from it by init_from. The folder appears only when it is
    complete. setting: that gives `path`, for messages. Raises ValueError where it holds something already, and where it
    cannot be written.
    """
    parameters = _shapes(dict(model.named_parameters()))
    files = {"weights-00001-of-00001.safetensors": parameters}
    if buffers := _shapes(saved_buffers(model)):
        files[f"{BUFFERS}.safetensors"] = buffers
    with new_folder(path, setting) as folder:
        left = iter(weights)
        written = [_write(folder / file, shapes, left) for file, shapes in files.items()]
        assert next(left, None) is None
        source.write_beside(folder)
        run = {**source.run, "model": settings}
        (folder / "config.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        index = {
            "format": FORMAT,
            "state": {**source.state, "model": settings},
            "adam_steps": 0,
            "files": {w.path.name: {"bytes": w.size, "crc32": w.checksums} for w in written},
        }
        (folder / INDEX).write_text(json.dumps(sealed(index), indent=1), encoding="utf-8")


def _shapes(tensors: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _write(path: Path, shapes: Shapes, weights: Iterator[tuple[str, Tensor | Entries]]) -> TensorWriter:
    """The tensors of these shapes, which come next, in one file."""
    writer = TensorWriter(path, shapes)
    try:
        for name, shape in shapes.items():
            given, tensor = next(weights)
            assert given == name
            written = 0
            for part in tensor if isinstance(tensor, Entries) else [tensor]:
                writer.write(name, part.flatten().float())
                written += part.numel()
            assert written == math.prod(shape), name
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return writer
