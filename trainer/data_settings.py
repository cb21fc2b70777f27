"""The settings of data: what is read, how it becomes tokens, and how tokens become rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataSettings:
    """What is read (`data.*`), how it becomes tokens, and how tokens become rows.

    `source` is stdlib, text, jsonl, parquet, hub or pretokenized. None means "the source's own default", so that a
    setting which the chosen source would ignore can be refused.
    """

    source: str = "stdlib"  # or text, jsonl, parquet, hub, pretokenized; data= chooses it with its defaults
    path: str | None = None  # file, folder or glob pattern: text, jsonl, parquet, pretokenized
    name: str | None = None  # hub: the data set, "owner/name"
    subset: str | None = None  # hub: its configuration
    split: str | None = None  # hub: "train" by default
    column: str | None = None  # field of the text ("text"), or of the token ids ("input_ids") for pretokenized
    max_documents: int | None = None  # hub: stop after so many documents
    tokenizer: str = "bpe"  # bytes, bpe (trained on the data), or the path or name of a Hugging Face tokenizer
    vocabulary_size: int | None = None  # bpe: 4096 by default
    sequence_length: int = 4096  # tokens in a packed row, over all its ranks
    rows_per_step: int = 8  # rows in the global batch, whatever the ranks
    rows_per_micro_batch: int = 1  # rows that a data-parallel rank computes at once
    validation_fraction: float = 0.05  # of the documents, chosen by the hash of their content
    cache_dir: str | None = None  # where tokens are kept: ~/.cache/longreach by default
