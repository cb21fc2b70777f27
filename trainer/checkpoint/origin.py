"""Origin: a Hugging Face model's own configuration beside its weights, carried through every stage of training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers

from ...models import hf
from ..data.tokenizers import TOKENIZER_FILE, Tokenizer
from . import checkpoint
from .choice import read_config

FILE = "origin.json"  # in a checkpoint
LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")


@dataclass(frozen=True)
class Origin:
    """The config.json and generation_config.json that training began with, empty where it began from nothing.

    longest_row: the most tokens in a row that any stage of training has read.
    """

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    longest_row: int = 0

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def of_rows(self, length: int) -> Origin:
        """Of training that goes on with rows of that many tokens."""
        return replace(self, longest_row=max(self.longest_row, length))

    @property
    def positions(self) -> int:
        """Rows of continued training are often shorter than those that the model was made for, and still is."""
        return max(self.longest_row, int(self.config.get("max_position_embeddings") or 0))


def read_origin(path: str | Path, tokenizer: Tokenizer | None) -> Origin:
    """The origin of a Hugging Face model, which is itself, or of a checkpoint, for a model that uses `tokenizer`.

    Ids of another tokenizer's tokens are left out. Raises ValueError for files that cannot be read or are no JSON.
    """
    path = Path(path).expanduser()
    try:
        if not checkpoint.is_one(path):
            origin, theirs = Origin(*hf.read_configs(path)), path / TOKENIZER_FILE
        else:
            origin, theirs = _of_checkpoint(path), path / "tokenizer" / TOKENIZER_FILE
    except OSError as error:
        raise ValueError(f"{path} must hold files that can be read; {error}. Check its permissions") from None
    if tokenizer is None or _same_ids(theirs, tokenizer):
        return origin
    return replace(origin, config=_without_ids(origin.config), generation=_without_ids(origin.generation))


def origin_of(begun: str | Path | None, tokenizer: Tokenizer | None, row: int) -> Origin:
    """The origin of a run that begins from a model, a checkpoint or nothing, and reads rows of `row` tokens."""
    before = read_origin(begun, tokenizer) if begun else Origin()
    return before.of_rows(row)


def _of_checkpoint(path: Path) -> Origin:
    if (file := path / FILE).is_file():
        try:
            return Origin(**hf.read_json(file))
        except TypeError as error:
            raise ValueError(f"{file} must hold what a checkpoint's says; {error}. Use another checkpoint") from None
    # One that was saved before checkpoints held their origin says where it began.
    run = read_config(path)
    begun = run.get("init_from")
    origin = read_origin(begun, None) if begun and Path(begun).expanduser().is_dir() else Origin()
    row = int(run.get("data", {}).get("sequence_length", 0))
    return replace(origin, longest_row=max(origin.longest_row, row))


def _same_ids(file: Path, tokenizer: Tokenizer) -> bool:
    """Whether ids mean the same to the tokenizer in `file`, or there is none; one of the two may have more tokens."""
    if not file.is_file():
        return True
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).items()
    except Exception:  # the library raises bare Exception
        return False
    ours = tokenizer.library.get_vocab(with_added_tokens=True).items()
    return theirs <= ours or ours <= theirs


def _without_ids(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if "token_id" not in key and key not in LISTS_OF_IDS}
