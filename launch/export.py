"""python -m longreach.launch.export checkpoint=PATH path=OUT — a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from ..models import hf
from ..trainer.checkpoint.choice import locate
from ..trainer.checkpoint.origin import read_origin
from ..trainer.checkpoint.source import OwnSource, Source
from ..trainer.data.tokenizers import Tokenizer, checkpoint_tokenizer
from ..trainer.engine import saved_buffers
from ..trainer.settings import home
from . import configuration
from .build import build

OWN = "own"
DTYPES = ("float32", "bfloat16", "float16")
OTHERS = (
    "Other models stay with LongReach: python -m longreach.launch.generate draws text from this checkpoint, init_from "
    "trains it further, and its weights are safetensors by parameter name in {}"
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class ExportSettings:
    """`checkpoint` is a checkpoint, or a run's folder, of which the newest is taken; `path` is a new folder."""

    checkpoint: str | None = None  # a checkpoint, or a run, of which the newest is taken
    path: str | None = None  # a new folder
    family: str | None = None  # to write; null: init_from's, or the one that others yield to; own: LongReach's names
    dtype: str = "float32"  # as in the checkpoint, or bfloat16, float16
    max_positions: int | None = None  # null: the scaling's, or the longest rows of any stage, or those of init_from
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
    check_form(settings.dtype, settings.max_positions, settings.shard_bytes)
    out = Path(home(settings.path, "path"))
    hf.check_new(out)
    source = OwnSource(locate(home(settings.checkpoint, "checkpoint"), "checkpoint"), build)
    if settings.family == OWN:
        if settings.max_positions is not None:
            raise ValueError(f"max_positions must be left out with family=own; got {settings.max_positions}")
        write_own(source, out, settings.dtype, settings.shard_bytes)
        return out
    write_hub(
        source,
        out,
        "path",
        family=settings.family,
        dtype=settings.dtype,
        max_positions=settings.max_positions,
        shard_bytes=settings.shard_bytes,
    )
    return out


def write_own(source: OwnSource, out: Path, dtype: str, shard_bytes: int) -> None:
    """Writes a model's tensors by their names in LongReach, in one file or in shards with an index; config.yaml too."""
    with torch.device("meta"):
        model = build(source.settings)
    buffers = saved_buffers(model)
    names = [*dict(model.named_parameters()), *buffers]
    with hf.new_folder(out) as folder:
        form = {"dtype": getattr(torch, dtype), "shard_bytes": shard_bytes}
        hf.write_as_it_is(source.weights(model), names, buffers, folder, **form)
        source.write_beside(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(source.run, sort_keys=False), encoding="utf-8")


def check_form(dtype: str | None, max_positions: int | None, shard_bytes: int) -> None:
    """Raises ValueError for settings of what is written that no model can have."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}. Choose one")
    if max_positions is not None and max_positions < 1:
        raise ValueError(
            f"max_positions must be at least 1; got {max_positions}. Leave it out: the longest rows trained on"
        )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1; got {shard_bytes}. Leave it out for {hf.SHARD_BYTES}")


def write_hub(
    source: Source,
    out: Path,
    setting: str,
    *,
    family: str | None,
    dtype: str | None,
    max_positions: int | None,
    shard_bytes: int,
) -> None:
    """Writes a model as a folder of Hugging Face, with its tokenizer and what its origin says of it.

    setting: that gives `out`, for messages. Raises ValueError as `export` does.
    """
    tokenizer = None
    if isinstance(source, OwnSource) and not source.came_without_tokenizer:
        tokenizer = checkpoint_tokenizer(source.path)
    origin = read_origin(source.path, tokenizer)
    ids = {key: origin.config[key] for key in IDS if key in origin.config}
    generation = origin.generation
    if tokenizer is not None:
        generation = {**generation, **_token_ids(generation or origin.config, tokenizer)}
        ids |= _token_ids(origin.config, tokenizer)
    try:
        positions = hf.max_positions(source.settings, origin.positions, family=family, origin=origin.config)
    except hf.NotExpressibleError as error:
        raise ValueError(f"{error}. {OTHERS.format(source.path)}") from None
    with torch.device("meta"):
        model = build(source.settings)
    hf.write(
        source.weights(model),
        source.settings,
        out,
        hf.tokenizer_files(source.tokenizer),
        max_positions=max_positions or positions,
        family=family,
        dtype=None if dtype is None else getattr(torch, dtype),
        config=ids,
        origin=origin.config,
        generation=generation or None,
        shard_bytes=shard_bytes,
        setting=setting,
    )


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
