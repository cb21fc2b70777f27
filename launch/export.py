"""python -m longreach.launch.export checkpoint=PATH path=OUT — a checkpoint as a folder that transformers loads."""

from __future__ import annotations

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
from ..trainer.checkpoint import checkpoint
from ..trainer.checkpoint.choice import locate, read_config
from ..trainer.checkpoint.origin import read_origin
from ..trainer.checkpoint.tensor_files import checksum
from ..trainer.data.tokenizers import Tokenizer, checkpoint_tokenizer
from ..trainer.engine import saved_buffers
from ..trainer.settings import home
from . import configuration
from .build import build

DTYPES = ("float32", "bfloat16", "float16")
OTHERS = (
    "Other models stay with LongReach: python -m longreach.launch.generate draws text from this checkpoint, init_from "
    "trains it further, and its weights are safetensors by parameter name in {}"
)


@dataclass
class ExportSettings:
    """`checkpoint` is a checkpoint, or a run's folder, of which the newest is taken; `path` is a new folder."""

    checkpoint: str | None = None
    path: str | None = None
    family: str | None = None  # model type to write; null: that of init_from, or else the one that others yield to
    dtype: str = "float32"  # as in the checkpoint, or bfloat16, float16
    max_positions: int | None = (
        None  # null: the scaling's own, or else the longest rows of any stage, or those of init_from
    )
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
    ValueError for settings that do not fit, for a checkpoint that is damaged, and for a model that the family, or none,
    expresses; nothing is left behind then.
    """
    if not settings.checkpoint:
        raise ValueError("checkpoint must be given; got none. Name a run or a checkpoint: checkpoint=runs/NAME/TIME")
    if not settings.path:
        raise ValueError("path must be a new folder for the exported model; got none. Give path=OUT")
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {settings.dtype!r}. Choose one")
    if settings.max_positions is not None and settings.max_positions < 1:
        raise ValueError(
            f"max_positions must be at least 1; got {settings.max_positions}. Leave it out: the longest rows trained on"
        )
    source = locate(home(settings.checkpoint, "checkpoint"), "checkpoint")
    run = read_config(source)
    with torch.device("meta"):
        model = build(run["model"])
    tokenizer = checkpoint_tokenizer(source)
    origin = read_origin(source, tokenizer)
    try:
        positions = hf.max_positions(run["model"], origin.positions, family=settings.family, origin=origin.config)
    except hf.NotExpressibleError as error:
        raise ValueError(f"{error}. {OTHERS.format(source)}") from None
    out = Path(home(settings.path, "path"))
    hf.write(
        _weights(checkpoint.verify(source), model),
        run["model"],
        out,
        hf.tokenizer_files(source / "tokenizer"),
        max_positions=settings.max_positions or positions,
        family=settings.family,
        dtype=getattr(torch, settings.dtype),
        config=_token_ids(origin.config, tokenizer),
        origin=origin.config,
        generation={**origin.generation, **_token_ids(origin.generation or origin.config, tokenizer)},
        shard_bytes=settings.shard_bytes,
    )
    return out


def _weights(stored: checkpoint.Stored, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and saved buffer, after its bytes were compared with their checksum."""
    for name, parameter in (*model.named_parameters(), *saved_buffers(model).items()):
        file, place, expected = stored.tensors.get(name, (None, None, None))
        if file is None or place is None or place.shape != tuple(parameter.shape):
            raise ValueError(f"checkpoint must hold the model of its config.yaml; got {stored.path} without its {name}")
        if checksum(stored.path / file, place) != expected:
            raise ValueError(f"checkpoint must be undamaged; got {stored.path}, where the bytes of {name} have changed")
        yield name, stored.map(name)


def _token_ids(said: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of what begins and ends a text, as trained; several ends, or a BOS that none used, as `said` before."""
    ends = said.get("eos_token_id")
    kept = tokenizer.end_of_text in (ends if isinstance(ends, list) else [ends])
    return {
        "bos_token_id": said.get("bos_token_id") if tokenizer.bos is None else tokenizer.bos,
        "eos_token_id": ends if kept else tokenizer.end_of_text,
    }


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()
    configuration.run_main(compose, "export", configuration.texts_of(ExportSettings))


if __name__ == "__main__":
    main()
