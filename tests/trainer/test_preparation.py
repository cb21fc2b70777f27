"""A model's vocabulary and its tokenizer's: what must have a row, and what need not."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from longreach.trainer.data.corpus import Corpus, open_corpus
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.data.tokenizers import byte_tokenizer
from longreach.trainer.evaluation.settings import EvaluationSettings
from longreach.trainer.preparation import model_settings
from longreach.trainer.settings import Settings

TARGET = {"_target_": "longreach.models.language_model.LanguageModel"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"document {i}, of so many words")
    return tmp_path


def one_longer(folder: Path, *, end: str = "<|endoftext|>", bos: bool = False) -> str:
    """Bytes, end of text 256 and `<tool>` 257, which text can hold, as an instruction-tuned model's added tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.library.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.library.post_processor = TemplateProcessing(single="<tool> $A", special_tokens=[("<tool>", 257)])
    tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return str(folder)


def prepared(texts: Path, tokenizer: str, rows: int | None = 257, **more: object) -> dict:
    given = {"source": "text", "path": str(texts / "*.txt"), "tokenizer": tokenizer, **more}
    prompt = str(given.pop("prompt", ""))
    origin = given.pop("init_from", None)
    data = DataSettings(cache_dir=str(texts / "cache"), **given)  # type: ignore[arg-type]
    settings = Settings(model={**TARGET, "vocabulary": rows}, data=data, evaluation=EvaluationSettings(prompt=prompt))
    corpus = open_corpus(data)
    assert isinstance(corpus, Corpus)
    settings.init_from = origin  # type: ignore[assignment]
    return model_settings(settings, corpus)


def test_a_tokenizer_one_id_longer_than_the_embedding_trains(texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = one_longer(texts / "tokenizer")
    with caplog.at_level(logging.WARNING, "longreach"):
        assert prepared(texts, tokenizer, prompt="document")["vocabulary"] == 257
    assert "the embedding has 257 rows, data.tokenizer 258 ids; none without a row occurs" in caplog.text
    caplog.clear()
    caplog.set_level(logging.INFO, "longreach")
    assert prepared(texts, tokenizer, 258)["vocabulary"] == 258
    assert prepared(texts, tokenizer, None)["vocabulary"] == 258
    assert "model.vocabulary" not in caplog.text
    assert prepared(texts, tokenizer, 300)["vocabulary"] == 300
    assert "the embedding has 300 rows, the data 258 ids; the other rows are of no token" in caplog.text


def test_an_id_that_occurs_without_a_row_is_named_with_what_helps(texts: Path) -> None:
    tokenizer = one_longer(texts / "tokenizer")
    with pytest.raises(ValueError, match=r"evaluation\.prompt must .*; got id 257 \('<tool>'\) .* Leave it out of"):
        prepared(texts, tokenizer, prompt="a <tool> for it")
    (texts / "held.txt").write_text("a document with a <tool> in it")
    with pytest.raises(ValueError, match=r"must be at least the data's 258; got 257, .* id 257 \('<tool>'\)") as caught:
        prepared(texts, tokenizer)
    assert "Leave model.vocabulary out or raise it to 258, or name a data.tokenizer with" in str(caught.value)
    assert "or leave the documents with this token out of the data" in str(caught.value)
    prepared(texts, tokenizer, 258)
    prepared(texts, "bytes")


def test_advice_under_init_from_can_be_followed(texts: Path) -> None:
    tokenizer = one_longer(texts / "tokenizer")
    (texts / "held.txt").write_text("a document with a <tool> in it")
    own = texts / "step-00000001"
    (own / "tokenizer").mkdir(parents=True)
    (own / "index.json").write_text("{}")
    (own / "config.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match=r"Leave data\.tokenizer out, to take that of init_from, or name") as caught:
        prepared(texts, tokenizer, init_from=str(own))
    assert "model.vocabulary out" not in str(caught.value)
    theirs = texts / "theirs"
    theirs.mkdir()
    config = {"model_type": "llama", "vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "intermediate_size": 8}
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Name a data\.tokenizer with smaller ids, or leave the doc") as caught:
        prepared(texts, tokenizer, init_from=str(theirs))
    assert "model.resize_token_embeddings(258)" in str(caught.value)
    assert "model.vocabulary out" not in str(caught.value)


def test_what_begins_or_ends_every_document_needs_a_row(texts: Path) -> None:
    begins = one_longer(texts / "begins", bos=True)
    with pytest.raises(ValueError, match=r"id 257 \('<tool>'\) .* Use data\.bos=false"):
        prepared(texts, begins)
    assert prepared(texts, begins, bos="false")["vocabulary"] == 257
    ends = one_longer(texts / "ends", end="<tool>")
    with pytest.raises(ValueError, match=r"id 257 \('<tool>'\) .* name a data\.tokenizer with smaller ids$"):
        prepared(texts, ends)


def test_ids_made_elsewhere_are_held_to_the_rows_too(texts: Path) -> None:
    tokenizer, file = one_longer(texts / "tokenizer"), texts / "ids.parquet"
    given = {"source": "pretokenized", "path": str(file)}
    pq.write_table(pa.table({"input_ids": [[i, 9, 256] for i in range(4)]}), file)
    assert prepared(texts, tokenizer, **given)["vocabulary"] == 257
    pq.write_table(pa.table({"input_ids": [[i, 257, 256] for i in range(4)]}), file)
    with pytest.raises(ValueError, match=r"got 257, without a row for id 257 \('<tool>'\)"):
        prepared(texts, tokenizer, **given)
    # Prompts begin with it, though these ids do not.
    pq.write_table(pa.table({"input_ids": [[i, 9, 256] for i in range(5)]}), file)
    with pytest.raises(ValueError, match=r"Use data\.bos=false"):
        prepared(texts, one_longer(texts / "begins", bos=True), **given)


def test_the_largest_id_is_that_of_all_batches(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.trainer.data.tokenization.BYTES_AT_ONCE", 20)
    data = DataSettings("text", str(texts / "*.txt"), tokenizer="bytes", cache_dir=str(texts / "cache"))
    cache = open_corpus(data).cache  # type: ignore[union-attr]
    assert cache.largest_id == max(int(np.max(cache[i])) for i in range(len(cache))) == 256
