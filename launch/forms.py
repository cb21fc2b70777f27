"""Forms: a model on the disk with its softmax attention as another mechanism, read one tensor at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import conversion
from ..models.conversion import Converted
from ..models.hf import Entries
from ..models.language_model import LanguageModel
from ..models.mixers.softmax.attention import Attention
from ..models.part import Part
from ..models.pattern import expand_pattern, run_lengths
from ..trainer.checkpoint.source import Readable, Source
from ..trainer.engine import saved_buffers
from .build import build

SPARSE = ("moba", "infllm_v2", "nsa")
OF_FORM = {"grouped": ("kv_heads",), "latent": ("latent_rank", "rope_heads")} | dict.fromkeys(SPARSE, ("mixer",))


@dataclass
class FormSettings:
    """Which attention takes which form; see `longreach.models.conversion`."""

    form: str | None = None  # grouped (fewer key/value heads), latent, moba, infllm_v2 or nsa; null: as it is
    mixers: list[str] = field(default_factory=list)  # names in model.mixers; empty: all of softmax attention
    layers: str | None = None  # of these mixers' layers, as a slice of Python: ":-3" leaves the last three as they are
    kv_heads: int | None = None  # of form=grouped: how many are left
    latent_rank: int | None = None  # of form=latent; null: as many numbers as make it exact
    rope_heads: int | None = None  # of form=latent, rotated key heads that are kept; null: all, which is exact
    mixer: dict[str, Any] = field(default_factory=dict)  # of a sparse form, what else it has: +mixer.block_size=64

    def check(self) -> None:
        """Raises ValueError for a form that there is not, and for settings that it does not use."""
        if self.form is not None and self.form not in OF_FORM:
            raise ValueError(f"form must be one of {', '.join(OF_FORM)}; got {self.form!r}. Choose one")
        used = OF_FORM.get(self.form or "", ()) + (("mixers", "layers") if self.form else ())
        for name in ("mixers", "layers", "kv_heads", "latent_rank", "rope_heads", "mixer"):
            if getattr(self, name) not in (None, [], {}) and name not in used:
                raise ValueError(f"{name} must be left out with form={self.form or 'null'}, where it has no effect")
        if self.form == "grouped" and self.kv_heads is None:
            raise ValueError("kv_heads must be given with form=grouped; got none. Say how many are left")


class Formed(Source):
    """A source with some of its attention in another form. Raises ValueError for attention that has no such form."""

    def __init__(self, source: Readable, settings: FormSettings) -> None:
        self._source, self._form = source, settings
        self.path, self.tokenizer = source.path, source.tokenizer
        self.run, self.state = source.run, source.state
        with torch.device("meta"):
            model = build(source.settings)
        self.settings = copy.deepcopy(source.settings)
        formed = self._form_settings(model, _chosen(model, settings))
        with torch.device("meta"):
            made = build(self.settings)
        self._before: dict[str, str] = {}  # paths of parts: the name of a mixer is in that of one beside others
        self._parts: dict[str, Attention] = {}
        for (before, part), (after, new) in zip(model.leaves(), made.leaves(), strict=True):
            self._before[after] = before
            if new.setting in formed:
                assert isinstance(part, Attention)
                self._parts[after] = part

    def _form_settings(self, model: LanguageModel, chosen: dict[str, Attention]) -> set[str]:
        """Gives chosen layers their mixer's new settings, under another name where other layers keep the old ones.

        Returns the settings that are new.
        """
        mixers = self.settings["mixers"]
        pattern, formed = expand_pattern(list(self.settings["pattern"]), model.depth, list(mixers)), set()
        for setting in dict.fromkeys(part.setting for part in chosen.values()):
            paths, name = [path for path, part in chosen.items() if part.setting == setting], setting.split(".")[-1]
            kept = any(part.setting == setting and path not in chosen for path, part in model.leaves())
            after = _unused(f"{name}_{self._form.form}", mixers) if kept else name
            mixers[after] = self._converted(paths[0], chosen[paths[0]]).settings
            formed.add(f"model.mixers.{after}")
            if kept:
                for number in {int(path.split(".")[1]) for path in paths}:
                    pattern[number] = re.sub(rf"\b{re.escape(name)}\b", after, pattern[number])
                self.settings["pattern"] = run_lengths(pattern)
        return formed

    def write_beside(self, folder: Path) -> None:
        self._source.write_beside(folder)

    def weights(self, model: LanguageModel) -> Iterator[tuple[str, Tensor | Entries]]:
        """As for other sources; says for each layer that is converted how exact it is."""
        at, weights = "", dict[str, Tensor]()
        for name in (*dict(model.named_parameters()), *saved_buffers(model)):
            path = next((path for path in self._before if name.startswith(f"{path}.")), "")
            own = name.removeprefix(f"{path}.")
            if path not in self._parts:
                yield name, self._source.read(f"{self._before[path]}.{own}" if path else name)
                continue
            if path != at:
                converted = self._converted(self._before[path], self._parts[path])
                at, weights = path, converted.weights
                print(f"{path}: {converted.report}", flush=True)
            yield name, weights[own]

    def _converted(self, path: str, part: Attention) -> Converted:
        name = part.setting.rpartition(".")[2]
        settings, form = self._source.settings["mixers"][name], self._form
        weights = {own: _whole(self._source.read(f"{path}.{own}")).float() for own, _ in part.named_parameters()}
        try:
            if form.form == "grouped":
                assert form.kv_heads is not None
                return conversion.grouped(part, settings, weights, form.kv_heads)
            if form.form == "latent":
                ranks = {"latent_rank": form.latent_rank, "rope_heads": form.rope_heads}
                return conversion.latent(part, settings, weights, **ranks)
            if form.form == "nsa":
                return conversion.native_sparse(part, settings, weights, form.mixer)
            return conversion.block_sparse(part, settings, weights, str(form.form), form.mixer)
        except ValueError as error:
            raise ValueError(f"{part.setting}: {error}") from None


def _chosen(model: LanguageModel, settings: FormSettings) -> dict[str, Attention]:
    """The mixers to convert, by path."""
    if unknown := [name for name in settings.mixers if name not in model.mixer_names]:
        raise ValueError(f"mixers must be names of {', '.join(model.mixer_names)}; got {unknown[0]}. Name others")
    parts = [(path, part) for path, part in model.leaves() if part.setting.startswith("model.mixers.")]
    chosen: dict[str, Part] = {
        path: part
        for path, part in parts
        if (part.setting.rpartition(".")[2] in settings.mixers if settings.mixers else isinstance(part, Attention))
    }
    if wrong := [part for part in chosen.values() if not isinstance(part, Attention)]:
        raise ValueError(
            f"mixers must be softmax attention for form={settings.form}; got {type(wrong[0]).__name__}. Name others in "
            "mixers"
        )
    if not chosen:
        raise ValueError("the model must have softmax attention to be converted; got none in it. Name another")
    within = {path: part for path, part in chosen.items() if path.startswith("blocks.")}  # others follow the last block
    kept = chosen if settings.layers is None else dict(list(within.items())[_slice(settings.layers)])
    if not kept:
        raise ValueError(f"layers must leave some of the {len(within)} that there are; got {settings.layers}. Widen it")
    return {path: part for path, part in kept.items() if isinstance(part, Attention)}


def _slice(text: str) -> slice:
    """`first:stop:step`, of which each may be left out."""
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:(-?[1-9]\d*)?)?", text):
        raise ValueError(f"layers must be a slice first:stop; got {text!r}. Write :-3 for all but the last three")
    return slice(*(int(part) if part else None for part in text.split(":")))


def _unused(name: str, known: dict[str, Any]) -> str:
    while name in known:
        name += "_"
    return name


def _whole(tensor: Tensor | Entries) -> Tensor:
    return tensor.whole() if isinstance(tensor, Entries) else tensor
