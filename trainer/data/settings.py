"""The settings of data: what is read, how it becomes tokens, and how tokens become rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..requirements import at_least


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
class DataSettings:
    """What is read (`data.*`), how it becomes tokens, and how tokens become rows.

    `source` is stdlib, text, jsonl, parquet, hub, pretokenized or recall. None means "the source's own default", so
    that a setting which the chosen source would ignore can be refused.
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
    sequence_length: int = 4096  # tokens in a packed row, over all its ranks
    rows_per_step: int = 8  # rows in the global batch, on any number of ranks
    rows_per_micro_batch: int = 1  # rows that a data-parallel rank computes at once
    validation_fraction: float = 0.05  # of the documents, chosen by the hash of their content
    cache_dir: str | None = None  # where tokens are kept: ~/.cache/longreach by default
    recall: RecallSettings = field(default_factory=RecallSettings)

    def check_rows(self, data_ranks: int) -> None:
        """Raises ValueError where that many data-parallel ranks cannot share the rows of a step evenly.

        The other settings are checked where the corpus is opened.
        """
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

    def micro_batches(self, data_ranks: int) -> int:
        """Micro-batches that each data-parallel rank computes in a step."""
        return self.rows_per_step // (data_ranks * self.rows_per_micro_batch)

    def same_documents(self, other: DataSettings) -> bool:
        """Whether both read the same tokens, cut into rows and steps in whatever way."""
        return self._without_rows() == other._without_rows()

    def _without_rows(self) -> DataSettings:
        return replace(self, sequence_length=0, rows_per_step=0, rows_per_micro_batch=0, cache_dir=None)
