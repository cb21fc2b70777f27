"""Hugging Face checkpoints: read as a `LanguageModel` and written so that transformers loads them.

Only safetensors and JSON are read and written; transformers is not needed. A family of models is one file in a folder
of `families/`, a table named `FAMILY`. The `model_type` of a config.json says which one reads it; `write` says which
one writes a model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .checkpoint import CONFIG, GENERATION, TOKENIZER_FILES, Checkpoint, Gather, Weights, read_json
from .checkpoint import prepare as prepare_filling
from .components import Settings
from .config import SAID_ANEW
from .family import OTHER_MODELS, Family
from .tensors import Entries, Recipe, Tensors
from .writing import SHARD_BYTES, WriteError, check_new, copy_files, new_folder, save_tensors, write_json

logger = logging.getLogger("longreach")

__all__ = [
    "CONFIG",
    "SHARD_BYTES",
    "TOKENIZER_FILES",
    "Entries",
    "NotExpressibleError",
    "Weights",
    "WriteError",
    "check_new",
    "copy_files",
    "known_families",
    "load",
    "max_positions",
    "new_folder",
    "open_weights",
    "prepare",
    "read_configs",
    "read_json",
    "read_settings",
    "tokenizer_files",
    "write",
    "write_as_it_is",
]


def read_settings(path: str | Path) -> Settings:
    """The settings of the `LanguageModel` in the folder `path`, as nested dicts like those of `conf/model`.

    Raises ValueError, naming the keys, for a model that is not supported.
    """
    config = _read_config(path)
    return _family(config).settings(config)


def open_weights(path: str | Path) -> Weights:
    """The weights in the folder `path`, as `LanguageModel` has them, read one at a time when they are asked for.

    Raises one ValueError that names every missing, unexpected or misshapen tensor; only headers are read for it.
    """
    config = _read_config(path)
    family = _family(config)
    checkpoint = Checkpoint(path, family.renamings)
    if others := {found[2] for name in checkpoint.headers if (found := re.match(OTHER_MODELS, name))}:
        _note(str(path), ", ".join(sorted(others)))
    return Weights(checkpoint, family.in_form(checkpoint.headers).tensors(family.settings(config)))


def prepare(path: str | Path, model: nn.Module) -> Callable[[Gather | None], None]:
    """What `load` checks; returns what it then does, which raises nothing that a rank alone could meet in `gather`."""
    return prepare_filling(open_weights(path), model)


def load(path: str | Path, model: nn.Module, gather: Gather | None = None) -> None:
    """Fills a model built from `read_settings(path)` with the weights in `path`, one tensor at a time.

    `gather([parameter])` makes a parameter whole on this rank while it is filled, and is entered for the same
    parameters in the same order on every rank. Values take the type and device of the parameter. Raises ValueError,
    before `gather` is first entered, that names every missing, unexpected or misshapen tensor.
    """
    prepare(path, model)(gather)


def write(
    state: Iterable[tuple[str, Tensor | Entries]],
    settings: Settings,
    path: str | Path,
    files: Iterable[Path] = (),
    *,
    max_positions: int,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    setting: str = "path",
) -> None:
    """Writes a model as the folder `path`: safetensors, config.json, and copies of `files` (those of the tokenizer).

    state: (name, tensor) of each parameter and buffer, shared ones once, taken and written one at a time.
    settings: those that the model was built from. max_positions: the sequence length that it was trained at.
    family: the model type to write. By default it is that of `origin`, if it expresses the settings, or else the one
        that does and to which the others yield.
    dtype: of the written tensors, by default as they are. config: more keys for config.json (ids of special tokens).
    origin: the config.json that the model was read from. What it says beside the settings is kept if the type is kept.
    generation: generation_config.json, if one shall be written. setting: that gives `path`, for messages.

    The folder appears only when it is complete. Raises ValueError, before anything is written, where `path` already
    holds something, the family is unknown or cannot express the settings, or several can and none yields;
    `NotExpressibleError` where none can; `WriteError` where the disk is full or not writable.
    """
    chosen, described = _expressed(settings, family, origin)
    if (needed := described.setdefault("max_position_embeddings", max_positions)) != max_positions:
        raise ValueError(f"max_positions must be {needed}, from which its rotation follows; got {max_positions}")
    if taken := sorted(set(described) & set(config or {})):
        raise ValueError(f"config must not hold what the settings say; got {', '.join(taken)}. Leave these out")
    # Where nothing is said of padding, some classes of transformers take an id that the vocabulary may not have.
    said = {"pad_token_id": None, **_kept(_current(origin or {}), described), **(config or {})}
    with new_folder(Path(path), setting) as folder:
        kept = save_tensors(state, chosen.tensors(settings), folder, dtype=dtype, shard_bytes=shard_bytes)
        write_json(folder / CONFIG, {**chosen.written(said), "torch_dtype": str(kept).split(".")[-1]})
        copy_files(files, folder)
        if generation is not None:
            write_json(folder / GENERATION, generation)


def write_as_it_is(
    state: Iterable[tuple[str, Tensor | Entries]],
    names: Iterable[str],
    buffers: Iterable[str],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters and `buffers`, all by our own `names`, into a folder; `dtype` is that of the parameters."""
    same = {name: Recipe((name,)) for name in names}
    save_tensors(state, Tensors(same, same, buffers=frozenset(buffers)), folder, dtype=dtype, shard_bytes=shard_bytes)


def _kept(origin: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """`described`, and what else its origin's config.json says: nothing of that changes what the weights compute."""
    if origin.get("model_type") != described["model_type"]:
        return dict(described)
    # Initial values were the origin's, and so was the name of the class.
    first = {key: origin[key] for key in ("architectures", "initializer_range") if origin.get(key) is not None}
    others = {key: value for key, value in origin.items() if key not in SAID_ANEW}
    return {**others, **described, **first}


def max_positions(
    settings: Settings, length: int, *, family: str | None = None, origin: Mapping[str, Any] | None = None
) -> int:
    """`max_position_embeddings` of a model that has read rows of `length` tokens; `family`, `origin` as for `write`.

    That of YaRN and LongRoPE is their factor times their original length: some versions of transformers compute the
    factor from it. That of dynamic scaling is its original length. Raises ValueError as `write` does where the family
    cannot be written.
    """
    described = _expressed(settings, family, origin)[1]
    scalings = [described.get("rope_scaling"), *(described.get("rope_parameters") or {}).values()]
    stretched = [
        round(scaling["factor"] * scaling["original_max_position_embeddings"])
        for scaling in scalings
        if isinstance(scaling, Mapping) and scaling.get("rope_type") in ("yarn", "longrope")
    ]
    return described.get("max_position_embeddings", max(stretched, default=length))


def read_configs(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, its keys named as the family's table names them, and generation_config.json of the folder `path`.

    Of a model of more than text, the former is that of its language model alone. The latter is empty where there is
    none.
    """
    generation = Path(path) / GENERATION
    return _current(_read_config(path)), read_json(generation) if generation.is_file() else {}


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files in the folder `path` that belong to a tokenizer or to how text is generated."""
    return [Path(path) / name for name in (*TOKENIZER_FILES, GENERATION) if (Path(path) / name).exists()]


@cache
def _note(path: str, others: str) -> None:
    """Says once what is not read."""
    logger.warning("%s: the language model alone is read, not %s", path, others)


def _read_config(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_dir():
        raise ValueError(
            f"init_from must be a folder with a Hugging Face model; got {path}. "
            "Download a model of the hub first: hf download NAME --local-dir PATH"
        )
    if not (Path(path) / CONFIG).is_file():
        raise ValueError(
            f"init_from must be a folder with {CONFIG}; got {path} without it. Name the folder of a model, or a "
            "run that has saved a checkpoint"
        )
    config = read_json(Path(path) / CONFIG)
    alone = (family.alone(config) for family in known_families().values())
    return dict(next((text for text in alone if text is not None), config))


class NotExpressibleError(ValueError):
    """No family of Hugging Face models can express the settings."""


@cache
def known_families() -> dict[str, Family]:
    """Every family, by model type."""
    found = walk_packages(families.__path__, f"{families.__name__}.")
    tables = [import_module(module.name).FAMILY for module in found if not module.ispkg]
    return {family.model_type: family for family in sorted(tables, key=lambda family: family.model_type)}


def _current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its keys as the family's table names them."""
    family = known_families().get(str(config.get("model_type")))
    return dict(config if family is None else family.current(config))


def _family(config: Mapping[str, Any]) -> Family:
    known, model_type = known_families(), config.get("model_type")
    if model_type not in known:
        raise ValueError(
            f"config.json's model_type must be one of {', '.join(known)}; got {model_type!r}. "
            "Name a model of these families, or train one from its beginning: model=llama_1b"
        )
    return known[model_type]


def _expressed(
    settings: Settings, family: str | None, origin: Mapping[str, Any] | None
) -> tuple[Family, dict[str, Any]]:
    """The family that the settings are written as, and the config.json."""
    known = known_families()
    if family is not None and family not in known:
        raise ValueError(f"family must be one of {', '.join(known)}; got {family!r}. Name one, or leave family out")
    written = {name: each.config(settings) for name, each in known.items()}
    able = [name for name, writer in written.items() if not writer.problems]
    if not able:
        raise NotExpressibleError(_nearest({name: writer.problems for name, writer in written.items()}))
    if family is None:
        began_as = (origin or {}).get("model_type")
        family = str(began_as) if began_as in able else _preferred(able)
    if family not in able:
        raise ValueError(
            f"family must be one that expresses the model; got {family}, which does not by "
            f"{'; '.join(written[family].problems)}. Choose {' or '.join(able)}, or leave family out"
        )
    return known[family], written[family].config


def _preferred(able: list[str]) -> str:
    """The family to which the others yield. Raises ValueError where there is none or more than one."""
    known = known_families()
    first = [name for name in able if not set(known[name].yields_to) & set(able)]
    if len(first) != 1:
        raise ValueError(
            f"family must be given where several express the model; got none. Choose {' or '.join(first or able)}"
        )
    return first[0]


def _nearest(problems: Mapping[str, list[str]]) -> str:
    """Says which settings the families that lack least do not express."""
    fewest = min(len(each) for each in problems.values())
    families_by_reason: dict[str, list[str]] = {}
    for name, each in problems.items():
        if len(each) == fewest:
            families_by_reason.setdefault("; ".join(each), []).append(name)
    nearest = "; ".join(f"{', '.join(names)} by {reason}" for reason, names in families_by_reason.items())
    return f"the model must be one that a Hugging Face family expresses; got one that none does: not {nearest}"
