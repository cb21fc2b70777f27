"""Rewriting: a checkpoint of other weights, made of one that is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ...models.hf.checkpoint import new_folder
from ...models.language_model import LanguageModel
from ..engine import saved_buffers
from .checkpoint import BUFFERS
from .choice import read_config
from .stored import FORMAT, INDEX, Stored
from .tensor_files import TensorWriter

KEPT = ("tokenizer", "origin.json")  # beside the weights


def rewrite(
    source: Stored, path: Path, model: LanguageModel, settings: dict[str, Any], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes the folder `path`: the checkpoint `source` with other weights, those of `model`, built from `settings`.

    weights: (name, tensor) of each parameter in the order of the model's, taken one at a time. The optimizer's moments
    are those of other parameters, and are left out: training begins from it by init_from. The folder appears only when
    it is complete. Raises ValueError where it holds something already.
    """
    run = {**read_config(source.path), "model": settings}
    with new_folder(path) as folder:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        written = [_write(folder / "weights-00001-of-00001.safetensors", shapes, weights)]
        if buffers := saved_buffers(model):
            shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
            written.append(
                _write(folder / f"{BUFFERS}.safetensors", shapes, ((name, source.map(name)) for name in shapes))
            )
        for name in KEPT:
            there = source.path / name
            if there.is_dir():
                shutil.copytree(there, folder / name)
            elif there.is_file():
                shutil.copyfile(there, folder / name)
        (folder / "config.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        files = {w.path.name: {"bytes": w.size, "crc32": w.checksums} for w in written}
        index = {"format": FORMAT, "state": source.state, "adam_steps": 0, "files": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write(path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]) -> TensorWriter:
    writer, names = TensorWriter(path, shapes), iter(shapes)
    for name, tensor in tensors:
        assert name == next(names)
        assert tuple(tensor.shape) == shapes[name], name
        writer.write(name, tensor.flatten())
    assert next(names, None) is None
    writer.close()
    return writer
