"""python -m longreach.launch.export checkpoint=PATH path=OUT — a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..models import hf
from ..models.language_model import LanguageModel
from ..trainer import checkpoint
from ..trainer.run_directory import locate, read_config
from ..trainer.tensor_files import checksum
from ..trainer.tokenizers import checkpoint_tokenizer
from . import configuration
from .build import build

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ExportSettings:
    """`checkpoint` is a checkpoint, or a run's folder, of which the newest is taken; `path` is a new folder."""

    checkpoint: str | None = None
    path: str | None = None
    dtype: str = "float32"  # as in the checkpoint, or bfloat16, float16
    max_positions: int | None = None  # null: data.sequence_length of the run, or those of init_from if they are more
    shard_bytes: int = 5_000_000_000  # largest file


configuration.register("export_settings", ExportSettings)


@hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="export")
def compose(config: DictConfig) -> None:
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, ExportSettings)
    try:
        print(f"written to {export(settings)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def export(settings: ExportSettings) -> Path:
    """Writes weights, config.json and tokenizer of a checkpoint; returns the new folder.

    One tensor after another goes from the checkpoint to the disk, so that no memory for the model is needed. Raises
    ValueError for settings that do not fit, for a checkpoint that is damaged, and for a model of no Hugging Face
    family; nothing is left behind then.
    """
    if not settings.checkpoint:
        raise ValueError("checkpoint must be given; got none. Name a run or a checkpoint: checkpoint=runs/NAME/TIME")
    if not settings.path:
        raise ValueError("path must be a new folder for the exported model; got none. Give path=OUT")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {settings.dtype!r}")
    if settings.max_positions is not None and settings.max_positions < 1:
        raise ValueError(f"max_positions must be at least 1; got {settings.max_positions}")
    source = locate(settings.checkpoint, "checkpoint")
    run = read_config(source)
    end_of_text = checkpoint_tokenizer(source).end_of_text
    with torch.device("meta"):
        model = build(run["model"])
    out = Path(settings.path).expanduser()
    hf.write(
        _weights(checkpoint.verify(source), model),
        run["model"],
        out,
        _files(source, run),
        max_positions=settings.max_positions or _max_positions(run),
        dtype=getattr(torch, settings.dtype),
        config={"bos_token_id": None, "eos_token_id": end_of_text},
        shard_bytes=settings.shard_bytes,
    )
    return out


def _weights(stored: checkpoint.Stored, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Each parameter, after its bytes were compared with their checksum."""
    for name, parameter in model.named_parameters():
        file, place, expected = stored.tensors.get(name, (None, None, None))
        if file is None or place is None or place.shape != tuple(parameter.shape):
            raise ValueError(f"checkpoint must hold the model of its config.yaml; got {stored.path} without its {name}")
        if checksum(stored.path / file, place) != expected:
            raise ValueError(f"checkpoint must be undamaged; got {stored.path}, where the bytes of {name} have changed")
        yield name, stored.map(name)


def _files(source: Path, run: dict[str, Any]) -> list[Path]:
    """The tokenizer's files, and what the model that training began with has beside them."""
    files = {file.name: file for file in hf.tokenizer_files(source / "tokenizer")}
    origin = run.get("init_from")
    if origin and run.get("data", {}).get("tokenizer") == origin:
        files = {file.name: file for file in hf.tokenizer_files(origin)} | files
    return list(files.values())


def _max_positions(run: dict[str, Any]) -> int:
    """Rows of continued training are often shorter than those that the model was made for, and still is."""
    trained, origin = int(run["data"]["sequence_length"]), run.get("init_from")
    try:
        before = json.loads((Path(origin) / "config.json").read_text(encoding="utf-8")) if origin else {}
        return max(trained, int(before.get("max_position_embeddings") or 0))
    except (OSError, ValueError):  # the folder that training began with has gone
        return trained


def main() -> None:
    configuration.quiet_libraries()
    configuration.run_main(compose, "export", ("checkpoint", "path"))


if __name__ == "__main__":
    main()
