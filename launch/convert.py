"""python -m longreach.launch.convert from=PATH to=OUT — a model in another format, or its attention in another form."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from ..models import hf
from ..trainer.checkpoint.rewriting import rewrite
from ..trainer.checkpoint.source import Source, open_source
from ..trainer.settings import home
from . import configuration
from .build import build
from .export import check_form, write_hub
from .forms import Formed, FormSettings


@dataclass
class ConvertSettings(FormSettings):
    """`from` is a Hugging Face model, a checkpoint, or a run, of which the newest is taken; `to` is a new folder.

    Without a form, or with a family, `to` becomes a Hugging Face model; else a checkpoint, with which init_from begins.
    """

    from_: str | None = None  # a Hugging Face model, a checkpoint, or a run, of which the newest is taken
    to: str | None = None  # a new folder
    family: str | None = None  # model type to write; null: that of the origin, or else the one that others yield to
    dtype: str | None = None  # of a Hugging Face model, float32, bfloat16 or float16; null: as its tensors are
    max_positions: int | None = None  # null: YaRN's own, or else the longest rows of any stage, or those of the origin
    shard_bytes: int = hf.SHARD_BYTES  # largest file


configuration.register("convert_settings", ConvertSettings)


def convert(settings: ConvertSettings) -> Path:
    """Writes a model as one of Hugging Face, or with its attention in another form, and says how exact that is.

    One tensor after another goes from disk to disk, and the folder appears when it is whole. Raises ValueError for
    settings that do not fit, for what cannot be read or contradicts itself, for a model that no family expresses, for
    attention that has no such form, and where `to` cannot be written.
    """
    settings.check()
    if not settings.from_:
        raise ValueError("from must be given; got none. Name a model's folder, a checkpoint or a run: from=PATH")
    if not settings.to:
        raise ValueError("to must be a new folder for the converted model; got none. Give to=OUT")
    check_form(settings.dtype, settings.max_positions, settings.shard_bytes)
    out, own = Path(home(settings.to, "to")), settings.form is not None and settings.family is None
    if own:
        _refuse_others(settings)
    hf.check_new(out, "to")
    source: Source = open_source(Path(home(settings.from_, "from")), "from", build)
    if settings.form is not None:
        source = Formed(source, settings)
    if own:
        with torch.device("meta"):
            model = build(source.settings)
        rewrite(source, out, model, source.settings, source.weights(model), "to")
    else:
        form = {"dtype": settings.dtype, "max_positions": settings.max_positions, "shard_bytes": settings.shard_bytes}
        write_hub(source, out, "to", family=settings.family, **form)
    return out


def _refuse_others(settings: ConvertSettings) -> None:
    """Raises ValueError for settings of Hugging Face models beside a form, of which a checkpoint comes."""
    default = ConvertSettings()
    for name in ("dtype", "max_positions", "shard_bytes"):
        if getattr(settings, name) != getattr(default, name):
            raise ValueError(
                f"{name} must be left out with a form and no family: a checkpoint comes of it, where it has no effect"
            )


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="convert")
    def compose(config: DictConfig) -> None:
        try:
            print(f"written to {convert(configuration.to_schema(config, ConvertSettings))}")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    configuration.run_main(compose, "convert", configuration.texts_of(ConvertSettings))


if __name__ == "__main__":
    main()
