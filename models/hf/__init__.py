"""Hugging Face checkpoints: read as a `LanguageModel` and written so that transformers loads them.

Only safetensors and JSON are read and written; transformers is not needed. A family of models is one file of this
folder that names an `Architecture` as `ARCHITECTURE`; which one reads a checkpoint follows from the `model_type` of
its config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, Settings
from .checkpoint import (
    CONFIG,
    GENERATION,
    SHARD_BYTES,
    TOKENIZER_FILES,
    Checkpoint,
    Gather,
    copy_files,
    load_tensors,
    new_folder,
    read_json,
    save_tensors,
    write_json,
)
from .config import SAID_ANEW

__all__ = [
    "TOKENIZER_FILES",
    "load",
    "max_positions",
    "read_configs",
    "read_json",
    "read_settings",
    "tokenizer_files",
    "write",
]


def read_settings(path: str | Path) -> Settings:
    """The settings of the `LanguageModel` in the folder `path`, as nested dicts like those of `conf/model`.

    Raises ValueError, naming the keys, for a model that is not supported.
    """
    config = _read_config(path)
    return _architecture(config).settings(config)


def load(path: str | Path, model: nn.Module, gather: Gather | None = None) -> None:
    """Fills a model built from `read_settings(path)` with the weights in `path`, one tensor at a time.

    `gather([parameter])` makes a parameter whole on this rank while it is filled, and is entered for the same
    parameters in the same order on every rank. Values take the type and device of the parameter. Raises ValueError,
    before `gather` is first entered, that names every missing, unexpected or misshapen tensor.
    """
    config = _read_config(path)
    architecture = _architecture(config)
    load_tensors(Checkpoint(path), model, architecture.tensors(architecture.settings(config)), gather)


def write(
    state: Iterable[tuple[str, Tensor]],
    settings: Settings,
    path: str | Path,
    files: Iterable[Path] = (),
    *,
    max_positions: int,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as the folder `path`: safetensors, config.json, and copies of `files` (those of the tokenizer).

    state: (name, tensor) of each parameter, shared ones once, taken one at a time; at most one shard is held.
    settings: those that the model was built from. max_positions: the sequence length that it was trained at.
    dtype: of the written tensors, by default as they are. config: more keys for config.json (ids of special tokens).
    origin: the config.json that the model was read from, of which is kept what settings do not say.
    generation: generation_config.json, if one shall be written. Raises ValueError where `path` already holds something,
    or no family can express the settings. The folder appears only when it is complete.
    """
    architecture, described = _expressed(settings)
    described["max_position_embeddings"] = max_positions
    if taken := sorted(set(described) & set(config or {})):
        raise ValueError(f"config must not hold what the settings say; got {', '.join(taken)}. Leave these out")
    said = {**_kept(origin or {}, described), **(config or {})}
    with new_folder(Path(path)) as folder:
        kept = save_tensors(state, architecture.tensors(settings), folder, dtype=dtype, shard_bytes=shard_bytes)
        write_json(folder / CONFIG, {**said, "torch_dtype": str(kept).split(".")[-1]})
        copy_files(files, folder)
        if generation is not None:
            write_json(folder / GENERATION, generation)


def _kept(origin: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """`described`, and what else its origin's config.json says: nothing of that changes what the weights compute."""
    if origin.get("model_type") != described["model_type"]:
        return dict(described)
    # Initial values were the origin's, and so was the name of the class.
    first = {key: origin[key] for key in ("architectures", "initializer_range") if origin.get(key) is not None}
    others = {key: value for key, value in origin.items() if key not in SAID_ANEW}
    return {**others, **described, **first}


def max_positions(settings: Settings, length: int) -> int:
    """`max_position_embeddings` of a model that has read rows of `length` tokens.

    That of YaRN is its factor times its original length: some versions of transformers compute the factor from it.
    Raises ValueError where no family can express the settings.
    """
    scaling = _expressed(settings)[1]["rope_scaling"]
    if scaling is None or scaling["rope_type"] != "yarn":
        return length
    return round(scaling["factor"] * scaling["original_max_position_embeddings"])


def read_configs(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of the folder `path`; the latter is empty where there is none."""
    generation = Path(path) / GENERATION
    return _read_config(path), read_json(generation) if generation.is_file() else {}


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files in the folder `path` that belong to a tokenizer or to how text is generated."""
    return [Path(path) / name for name in (*TOKENIZER_FILES, GENERATION) if (Path(path) / name).exists()]


def _read_config(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_dir():
        raise ValueError(
            f"init_from must be a folder with a Hugging Face model; got {path}. "
            "Download a model of the hub first: hf download NAME --local-dir PATH"
        )
    return read_json(Path(path) / CONFIG)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    known = {name: architecture for architecture in _architectures() for name in architecture.model_types}
    model_type = config.get("model_type")
    if model_type not in known:
        raise ValueError(
            f"config.json's model_type must be one of {', '.join(sorted(known))}; got {model_type!r}. "
            "Name a model of these families, or train one from its beginning: model=llama_1b"
        )
    return known[model_type]


def _architectures() -> list[Architecture]:
    modules = (import_module(f".{module.name}", __name__) for module in iter_modules(__path__))
    return [module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE")]


def _expressed(settings: Settings) -> tuple[Architecture, dict[str, Any]]:
    """The family that can express these settings, and its config."""
    reasons = []
    for architecture in _architectures():
        try:
            return architecture, architecture.config(settings)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))
