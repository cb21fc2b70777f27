"""The settings of data: what is read, how it becomes tokens, and how tokens become rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from ..requirements import at_least, one_of

PACKINGS = ("concat", "best_fit")


@dataclass
class RecallSettings:
    """Problems of multi-query associative recall, for data=recall; `trainer/data/recall.py` says how they are drawn."""

    length: int | None = None  # tokens of a problem; null: data.sequence_length
    pairs: int = 16  # keys, each with its value, at the beginning of a problem
    spread: int | None = None  # tokens at the beginning among which pairs stand anywhere; null: one after another
    queries: int | None = None  # keys that come again, each before its value; null: every key once
    power: float = 0.01  # how likely a query is at place i behind the pairs: as i^(power - 1); 1: anywhere alike
    filler: str = "blank"  # what stands between pairs and queries: one token; or random ones
    seed: int = 0  # of the problems, which trainer.seed does not change
    validation_documents: int = 1024  # held-out problems, drawn apart from those of training


@dataclass
class MixtureSource:
    """A source of a mixture, `data.mixture.NAME`: which documents, as `data.*` names them, and their share of the rows.

    Two sources of the same documents with other lengths are buckets of them, as for more of the long ones.
    """

    weight: float = 1.0  # share of the rows, beside those of the other sources
    source: str = "text"  # or stdlib, jsonl, parquet, hub, pretokenized
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    max_documents: int | None = None
    min_length: int | None = None  # documents of so many tokens or more, the end of text counted
    max_length: int | None = None  # documents of so many tokens or fewer


@dataclass
class DataSettings:
    """What is read (`data.*`), how it becomes tokens, and how tokens become rows.

    `source` is stdlib, text, jsonl, parquet, hub, pretokenized or recall; a `mixture` has its own. None means "the
    source's own default", so that a setting which the chosen source would ignore can be refused.
    """

    source: str = "stdlib"  # or text, jsonl, parquet, hub, pretokenized, recall; data= chooses it with its defaults
    path: str | None = None  # file, folder or glob pattern: text, jsonl, parquet, pretokenized
    name: str | None = None  # hub: the data set, "owner/name"
    subset: str | None = None  # hub: its configuration
    split: str | None = None  # hub: "train" by default
    column: str | None = None  # field of the text ("text"), or of the token ids ("input_ids") for pretokenized
    max_documents: int | None = None  # hub: stop after so many documents; recall: begin again
    tokenizer: str = "bpe"  # bytes, bpe (trained on the data), or the path or name of a Hugging Face tokenizer
    bos: str = "auto"  # documents and prompts begin with BOS: auto = as the tokenizer's own template says; true; false
    vocabulary_size: int | None = None  # bpe: 4096 by default; recall: 8192
    mixture: dict[str, MixtureSource] = field(default_factory=dict)  # sources by name, each with settings and a weight
    packing: str = "concat"  # rows cut anywhere; or best_fit: documents whole unless longer than a row, and padding
    audit: bool = False  # write which tokens each step has read, for python -m longreach.launch.audit run=DIR
    restart: bool = False  # a resumed run may go on with other data; optimizer states and step are kept
    sequence_length: int = 4096  # tokens in a packed row, over all its ranks
    rows_per_step: int = 8  # rows in the global batch, on any number of ranks
    rows_per_micro_batch: int = 1  # rows that a data-parallel rank computes at once
    validation_fraction: float = 0.05  # of the documents, chosen by the hash of their content
    cache_dir: str | None = None  # where tokens are kept: ~/.cache/longreach by default
    recall: RecallSettings = field(default_factory=RecallSettings)

    def __post_init__(self) -> None:
        """A source of the mixture may be given as a mapping. Raises ValueError for what it has no setting for."""
        known = [each.name for each in fields(MixtureSource)]
        made: dict[str, MixtureSource] = {}
        for name, part in self.mixture.items():
            given = dict(part) if isinstance(part, Mapping) else {}
            if unknown := [key for key in given if key not in known]:
                raise ValueError(
                    f"data.mixture.{name}.{unknown[0]} must be a setting; got a name that nothing reads. Known: "
                    f"{', '.join(known)}"
                )
            made[name] = MixtureSource(**given) if isinstance(part, Mapping) else part
        self.mixture = made

    def check_rows(self, data_ranks: int) -> None:
        """Raises ValueError where that many data-parallel ranks cannot share the rows of a step evenly.

        The other settings are checked where the corpus is opened.
        """
        one_of("data.packing", self.packing, PACKINGS)
        at_least("data.rows_per_step", self.rows_per_step, 1)
        at_least("data.rows_per_micro_batch", self.rows_per_micro_batch, 1)
        at_once = data_ranks * self.rows_per_micro_batch
        if self.rows_per_step % at_once:
            raise ValueError(
                f"data.rows_per_step must be a multiple of {at_once} ({data_ranks} data-parallel rank(s) times "
                f"data.rows_per_micro_batch={self.rows_per_micro_batch}); got {self.rows_per_step}. "
                f"Use {(self.rows_per_step // at_once + 1) * at_once}, or let more ranks share a row "
                "(parallel.sequence)"
            )

    def sources(self) -> dict[str, DataSettings]:
        """The settings of each source of the mixture alone, in the order of their names.

        Raises ValueError for what a mixture cannot have, or leaves without effect.
        """
        if not self.mixture:
            raise ValueError(
                "data.mixture must name at least one source with data=mixture; got none. Give it: "
                "data.mixture='{NAME: {source: text, path: PATH, weight: 1}}'"
            )
        if self.source not in ("stdlib", "mixture"):
            raise ValueError(
                f"data.source must be left out with data.mixture, whose sources have their own; got {self.source}. "
                "Use data=mixture"
            )
        for setting in ("path", "name", "subset", "split", "column", "max_documents"):
            if (value := getattr(self, setting)) is not None:
                raise ValueError(
                    f"data.{setting} must be left out with data.mixture; got {value!r}. Give it to a source: "
                    f"data.mixture.NAME.{setting}"
                )
        made = {}
        for name, part in sorted(self.mixture.items()):
            _check_part(name, part)
            own = {key: value for key, value in asdict(part).items() if hasattr(self, key)}
            made[name] = replace(self, mixture={}, **own)
        return made

    def same_documents(self, other: DataSettings) -> bool:
        """Whether both read the same documents, cut into rows and steps in whatever way."""
        return self._without_rows() == other._without_rows()

    def _without_rows(self) -> DataSettings:
        return replace(
            self, sequence_length=0, rows_per_step=0, rows_per_micro_batch=0, packing="", audit=False, restart=False
        )

    def micro_batches(self, data_ranks: int) -> int:
        """Micro-batches that each data-parallel rank computes in a step."""
        return self.rows_per_step // (data_ranks * self.rows_per_micro_batch)


def _check_part(name: str, part: MixtureSource) -> None:
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(
            f"data.mixture must name its sources with letters, digits and _, as metrics do; got {name!r}. Rename it"
        )
    setting = f"data.mixture.{name}"
    one_of(f"{setting}.source", part.source, ("stdlib", "text", "jsonl", "parquet", "hub", "pretokenized"))
    at_least(f"{setting}.min_length", part.min_length, 1)
    at_least(f"{setting}.max_length", part.max_length, part.min_length or 1)
