"""python -m longreach.launch.convert checkpoint=PATH path=OUT form=latent — attention as another form of attention."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from ..models import conversion
from ..models.conversion import Converted
from ..models.language_model import LanguageModel
from ..models.mixers.softmax.attention import Attention
from ..models.part import Part
from ..trainer.checkpoint.choice import locate, read_config
from ..trainer.checkpoint.rewriting import rewrite
from ..trainer.checkpoint.stored import Stored, check_bytes, verify
from ..trainer.settings import home
from . import configuration
from .build import build

FORMS = ("grouped", "latent")


@dataclass
class ConvertSettings:
    """`checkpoint` is a checkpoint, or a run's folder, of which the newest is taken; `path` is a new folder."""

    checkpoint: str | None = None
    path: str | None = None
    form: str | None = None  # grouped: fewer key/value heads; latent: of one latent per token
    mixers: list[str] = field(default_factory=list)  # names in model.mixers; empty: all of softmax attention
    kv_heads: int | None = None  # of form=grouped: how many are left
    latent_rank: int | None = None  # of form=latent; null: as many numbers as make it exact
    rope_heads: int | None = None  # of form=latent, rotated key heads that are kept; null: all, which is exact


configuration.register("convert_settings", ConvertSettings)


def convert(settings: ConvertSettings) -> Path:
    """Writes the checkpoint with its attention in another form, and prints for each layer how exact it is.

    Training goes on from the new folder by init_from. One layer after another goes from disk to disk. Raises
    ValueError for settings that do not fit, for attention that has no such form, and for a damaged checkpoint.
    """
    _check(settings)
    source = locate(home(settings.checkpoint or "", "checkpoint"), "checkpoint")
    before = dict(read_config(source)["model"])
    model = _on_meta(before)
    chosen = _chosen(model, settings.mixers, settings.form)
    stored = verify(source).named_for(dict(model.named_parameters()))
    check_bytes(stored, [name for name, _ in model.named_parameters()])
    after, out = copy.deepcopy(before), Path(home(settings.path or "", "path"))
    for name, (path, part) in {part.setting: (path, part) for path, part in chosen.items()}.items():
        after["mixers"][name.rpartition(".")[2]] = _converted(stored, path, part, before, settings).settings
    made = _on_meta(after)
    rewrite(stored, out, made, after, _weights(stored, made, chosen, before, settings))
    return out


def _check(settings: ConvertSettings) -> None:
    if not settings.checkpoint:
        raise ValueError("checkpoint must be given; got none. Name a run or a checkpoint: checkpoint=runs/NAME/TIME")
    if not settings.path:
        raise ValueError("path must be a new folder for the converted checkpoint; got none. Give path=OUT")
    if settings.form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {settings.form!r}. Choose one")
    if settings.form == "grouped" and settings.kv_heads is None:
        raise ValueError("kv_heads must be given with form=grouped; got none. Say how many are left")
    others = ("latent_rank", "rope_heads") if settings.form == "grouped" else ("kv_heads",)
    if given := [name for name in others if getattr(settings, name) is not None]:
        raise ValueError(f"{given[0]} must be left out with form={settings.form}, where it has no effect")


def _on_meta(settings: dict[str, Any]) -> LanguageModel:
    with torch.device("meta"):
        return build(settings)


def _chosen(model: LanguageModel, names: list[str], form: str | None) -> dict[str, Part]:
    """The mixers to convert, by path."""
    if unknown := [name for name in names if name not in model.mixer_names]:
        raise ValueError(f"mixers must be names of {', '.join(model.mixer_names)}; got {unknown[0]}. Name others")
    parts = [(path, part) for path, part in model.leaves() if part.setting.startswith("model.mixers.")]
    chosen = {
        path: part
        for path, part in parts
        if (part.setting.rpartition(".")[2] in names if names else isinstance(part, Attention))
    }
    if wrong := [part for part in chosen.values() if not isinstance(part, Attention)]:
        raise ValueError(
            f"mixers must be softmax attention for form={form}; got {type(wrong[0]).__name__}. Name others in mixers"
        )
    if not chosen:
        raise ValueError("checkpoint must be of a model with softmax attention; got none in it. Name another")
    return chosen


def _converted(stored: Stored, path: str, part: Part, model: dict[str, Any], settings: ConvertSettings) -> Converted:
    assert isinstance(part, Attention)
    name = part.setting.rpartition(".")[2]
    weights = {name: stored.map(f"{path}.{name}") for name, _ in part.named_parameters()}
    try:
        if settings.form == "grouped":
            assert settings.kv_heads is not None
            return conversion.grouped(part, model["mixers"][name], weights, settings.kv_heads)
        return conversion.latent(
            part, model["mixers"][name], weights, latent_rank=settings.latent_rank, rope_heads=settings.rope_heads
        )
    except ValueError as error:
        raise ValueError(f"{part.setting}: {error}") from None


def _weights(
    stored: Stored, made: LanguageModel, chosen: dict[str, Part], model: dict[str, Any], settings: ConvertSettings
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the new model, in its order; a converted layer's together."""
    at, weights = "", dict[str, Tensor]()
    for name, _ in made.named_parameters():
        path = next((path for path in chosen if name.startswith(f"{path}.")), None)
        if path is None:
            yield name, stored.map(name)
            continue
        if path != at:
            at, (_, weights, errors) = path, _converted(stored, path, chosen[path], model, settings)
            off = [f"{what} off by {error:.1e}" for what, error in errors.items() if error]
            print(f"{path}: {', '.join(off) or 'exact'}", flush=True)
        yield name, weights[name.removeprefix(f"{path}.")]


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
