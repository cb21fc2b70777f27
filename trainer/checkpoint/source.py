"""Source: a model on the disk, ours or Hugging Face's, of which others are made: its weights are read one at a time."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import hf
from ...models.hf import Entries
from ...models.language_model import LanguageModel
from ..data.tokenizers import TOKENIZER_FILE
from ..engine import saved_buffers
from .choice import is_own, locate, read_config
from .origin import FILE, Origin, read_origin
from .stored import CheckpointError, check_bytes, differences, verify

Build = Callable[[dict[str, Any]], LanguageModel]


class Source(ABC):
    """path: its folder. settings: of its `LanguageModel`. run: the configuration that a checkpoint of it has.

    state: what a checkpoint says of the run. tokenizer: the folder with the tokenizer's files.
    """

    path: Path
    settings: dict[str, Any]
    run: dict[str, Any]
    state: dict[str, Any]
    tokenizer: Path

    @abstractmethod
    def weights(self, model: LanguageModel) -> Iterator[tuple[str, Tensor | Entries]]:
        """(name, tensor) of each parameter and saved buffer of the model that its settings describe, in its order.

        Raises ValueError where the bytes of one are not what they were.
        """

    @abstractmethod
    def write_beside(self, folder: Path) -> None:
        """Writes what a checkpoint of the model has beside its weights: the tokenizer, and where it began."""


class Readable(Source):
    """A source whose tensors can be read in any order."""

    @abstractmethod
    def read(self, name: str) -> Tensor | Entries:
        """The parameter or buffer of this name. Raises ValueError as `weights` does."""

    def weights(self, model: LanguageModel) -> Iterator[tuple[str, Tensor | Entries]]:
        for name in (*dict(model.named_parameters()), *saved_buffers(model)):
            yield name, self.read(name)


class OwnSource(Readable):
    """A checkpoint of LongReach. Raises CheckpointError, naming the tensors, where config.yaml is of another model."""

    def __init__(self, path: Path, build: Build) -> None:
        self.path, self.tokenizer = path, path / "tokenizer"
        self.run = read_config(path)
        self.settings = self.run["model"]
        with torch.device("meta"):
            model = build(self.settings)
        expected = {**dict(model.named_parameters()), **saved_buffers(model)}
        self.stored = verify(path).named_for(expected)
        self.state = self.stored.state
        if problems := differences(self.stored, {name: tensor.shape for name, tensor in expected.items()}):
            raise CheckpointError(
                f"checkpoint {path} must hold the model of its config.yaml; {problems}. Use another one, or correct "
                "config.yaml"
            )

    @property
    def came_without_tokenizer(self) -> bool:
        """Whether it began as a Hugging Face model that had none, or a slow one alone."""
        return not (self.tokenizer / TOKENIZER_FILE).is_file() and bool(read_origin(self.path, None).config)

    def read(self, name: str) -> Tensor:
        check_bytes(self.stored, [name])
        return self.stored.map(name)

    def write_beside(self, folder: Path) -> None:
        if self.tokenizer.is_dir():
            shutil.copytree(self.tokenizer, folder / "tokenizer")
        if (self.path / FILE).is_file():
            shutil.copyfile(self.path / FILE, folder / FILE)


class HubSource(Readable):
    """A folder of a Hugging Face model. Raises ValueError for what is no such thing: see `hf.open_weights`."""

    def __init__(self, path: Path, build: Build) -> None:
        self.path = self.tokenizer = path
        self.settings = hf.read_settings(path)
        self.run, self.state = {"model": self.settings}, {"step": 0}
        self._weights = hf.open_weights(path)
        with torch.device("meta"):
            self._buffers = saved_buffers(build(self.settings))

    def read(self, name: str) -> Tensor | Entries:
        fixed = self._weights.tensors.fixed
        if name not in fixed:
            return self._weights.read(name)
        shape, value = self._buffers[name].shape, fixed[name]
        return torch.full(shape, 1 / shape[0] if value is None else value)  # shares of experts, which begin even

    def write_beside(self, folder: Path) -> None:
        Origin(*hf.read_configs(self.path)).save(folder)
        if files := hf.tokenizer_files(self.path):
            (folder / "tokenizer").mkdir()
            hf.copy_files(files, folder / "tokenizer")


def open_source(path: Path, setting: str, build: Build) -> Readable:
    """The checkpoint at `path`, or the newest one where that is a run, or the Hugging Face model.

    setting: that gives `path`, for messages. Of the weights nothing but headers is read. Raises ValueError for what
    cannot be read, is not whole, or contradicts its own configuration.
    """
    if path.is_dir() and is_own(path):
        return OwnSource(locate(path, setting), build)
    if not (path / hf.CONFIG).is_file():
        raise ValueError(
            f"{setting} must be a folder with a Hugging Face model, a checkpoint or a run; got {path}"
            f"{f' without {hf.CONFIG}' if path.is_dir() else ''}. Check the path, or download a model of the hub: hf "
            "download NAME --local-dir PATH"
        )
    return HubSource(path, build)
