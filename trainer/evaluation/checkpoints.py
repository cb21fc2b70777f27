"""Checkpoints, scored without their runs: tasks, the loss by position in long documents, and the gain from context."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models import hf
from ...models.activations.recomputation import SETTINGS as MEMORY
from ...models.language_model import LanguageModel
from ...parallel.mesh import Mesh
from ...parallel.strategy import Strategy
from ..checkpoint import checkpoint
from ..checkpoint.choice import is_own, locate, read_config
from ..data.corpus import Corpus, open_corpus
from ..data.settings import DataSettings, RecallSettings
from ..data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from ..ranks.exchange import prepare
from .documents import HeldOut, LongDocuments, Texts, read_texts
from .evaluation import FIRST_BUCKET, Loss, Scored, evaluate, evaluate_truncated
from .suite import layout_for


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is evaluated; tokenizer: None for a model without text.

    config: of its run, or of the model alone where that is one of Hugging Face.
    """

    path: Path
    step: int
    config: dict[str, Any]
    tokenizer: Tokenizer | None

    @classmethod
    def at(cls, path: str, setting: str) -> Subject:
        """The checkpoint at `path`, the newest of a run, or a model of Hugging Face.

        Raises ValueError where there is none that is complete.
        """
        folder = Path(path).expanduser()
        if (folder / hf.CONFIG).is_file() and not is_own(folder):
            tokenizer = load_tokenizer(folder) if any(folder.glob("tokenizer*")) else None
            return cls(folder, 0, {"model": hf.read_settings(folder)}, tokenizer)
        found = locate(path, setting)
        stored = checkpoint.verify(found)
        config = read_config(found)
        of_text = config["data"].get("source") != "recall"
        if of_text and not (found / "tokenizer" / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"{setting} must hold the tokenizer of its text; got {found} without tokenizer/{TOKENIZER_FILE}. Copy "
                "the folder from another checkpoint of the run"
            )
        tokenizer = load_tokenizer(found / "tokenizer") if of_text else None
        return cls(found, int(stored.state["step"]), config, tokenizer)

    @property
    def name(self) -> str:
        """As maps call it."""
        return re.sub(r"^step-0*(?=\d)", "", self.path.name)

    @property
    def model(self) -> dict[str, Any]:
        """Its model's configuration, without what saves memory in training."""
        return {name: value for name, value in self.config["model"].items() if name not in MEMORY}

    def read(self, model: LanguageModel) -> None:
        """Fills the model. Raises ValueError for weights that are damaged or another model's."""
        if "data" in self.config:
            model.at_step(checkpoint.load_weights(self.path, model)["step"])
        else:
            hf.load(self.path, model)

    @property
    def declared(self) -> int | None:
        """The longest row that it was trained on, or that its config.json declares; None where it says nothing."""
        if "data" in self.config:
            return self.length
        text = json.loads((self.path / hf.CONFIG).read_text(encoding="utf-8"))
        return text.get("max_position_embeddings", text.get("text_config", {}).get("max_position_embeddings"))

    @property
    def length(self) -> int:
        """The tokens of a row that it was trained on. Raises ValueError where that is not known."""
        if "data" not in self.config:
            raise ValueError(f"lengths must be given for a model of Hugging Face; got none with {self.path}")
        return int(self.config["data"]["sequence_length"])

    @property
    def vocabulary(self) -> int:
        """Ids of its data are smaller; the model may have more rows."""
        return int(self.model["vocabulary"]) if self.tokenizer is None else self.tokenizer.vocabulary_size

    def texts(self, path: str | None, mesh: Mesh) -> Texts:
        """The documents of files of text, or the held-out ones of its run's data. Every rank calls it.

        Raises ValueError where there are none.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(f"checkpoint must be of a model of text; got {self.path}, which has no tokenizer")
        if path is None and "data" not in self.config:
            raise ValueError(f"text must be given with a model of Hugging Face; got none with {self.path}")
        if path is not None:
            return prepare(mesh, lambda: read_texts(path, tokenizer, "text"))
        corpus = prepare(mesh, lambda: open_corpus(_data_of(self.config["data"]), tokenizer=tokenizer))
        assert isinstance(corpus, Corpus)
        return HeldOut(corpus)


def _data_of(config: dict[str, Any]) -> DataSettings:
    """The settings of a run's data, without those that an older or newer LongReach had."""
    known = {field.name for field in dataclasses.fields(DataSettings)}
    given = {name: value for name, value in config.items() if name in known}
    return DataSettings(**given | {"recall": RecallSettings(), "audit": False, "restart": False})


@dataclass(frozen=True)
class Reading:
    """How long documents are read: their number, the shorter context beside the whole one, and how ranks share them."""

    documents: int
    context: int | None
    ranks: int
    spans: int
    strategy: Strategy


def score_documents(
    model: Scored, texts: Texts, lengths: Sequence[int], reading: Reading, say: Callable[[str], None]
) -> dict[str, Any]:
    """The loss on the first tokens of long documents, by position and with a shorter context; every rank calls it.

    Lines of `documents` for each length, and lines of `positions` for each bucket of positions of each length.
    """
    lines, buckets = list[dict[str, Any]](), list[dict[str, Any]]()
    for length in lengths:
        layout = layout_for(length, reading.ranks, reading.spans)
        stream = LongDocuments(texts, length, layout.length, "lengths")
        rows = min(stream.rows, reading.documents)
        say(f"reading the first {length} tokens of {rows} documents")
        loss = evaluate(model, stream, layout, reading.strategy, rows, 1, positions=True)
        line: dict[str, Any] = {"length": length, "documents": rows, "loss": loss.mean, "accuracy": loss.accuracy}
        if reading.context is not None:
            cut = evaluate_truncated(model, stream, rows, reading.context, layout.local_length)
            line |= {"truncated_context": reading.context, "truncated_loss": cut.mean, "gain": cut.mean - loss.mean}
        lines.append(line)
        buckets += [{"length": length, **bucket} for bucket in by_position(loss)]
    return {"documents": lines, "positions": buckets}


def by_position(loss: Loss) -> list[dict[str, Any]]:
    """A line for each bucket of positions that has targets, from the first."""
    made, first, end = list[dict[str, Any]](), 0, FIRST_BUCKET
    for total, number in loss.buckets:
        if number:
            made.append({"first": first, "last": end - 1, "loss": total / number, "targets": number})
        first, end = end, 2 * end
    return made
