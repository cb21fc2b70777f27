"""Mixtures as they are opened: from settings to rows of several sources, with one tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.trainer.data.corpus import Corpus, open_corpus
from longreach.trainer.data.settings import DataSettings, MixtureSource
from longreach.trainer.data.streams.mixture import MixtureStream


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two sources of 60 texts, of words of their own."""
    made = {}
    for name, word in (("code", "return self"), ("books", "once upon a time")):
        made[name] = tmp_path / name
        made[name].mkdir()
        for number in range(60):
            (made[name] / f"{number:02}.txt").write_text(f"{name} {number} " + f"{word} {number} " * (1 + number))
    return made


def opened(tmp_path: Path, mixture: dict[str, MixtureSource], **given: Any) -> Corpus:
    given = {"tokenizer": "bytes", "sequence_length": 64, "validation_fraction": 0.2} | given
    made = open_corpus(DataSettings(mixture=mixture, cache_dir=str(tmp_path / "cache"), **given), seed=4)
    assert isinstance(made, Corpus)
    return made


def halves(folders: dict[str, Path]) -> dict[str, MixtureSource]:
    return {name: MixtureSource(weight, path=str(folders[name])) for name, weight in (("code", 0.75), ("books", 0.25))}


def text(corpus: Corpus, row: int) -> str:
    assert isinstance(corpus.train, MixtureStream)
    return corpus.tokenizer.decode(corpus.train.row(row).tokens.tolist())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_each_row_is_of_one_source_and_weights_are_exact(
    tmp_path: Path, folders: dict[str, Path], tokenizer: str
) -> None:
    corpus = opened(tmp_path, halves(folders), tokenizer=tokenizer, vocabulary_size=None)
    assert corpus.train.names == ("books", "code")
    counts = {"books": 0, "code": 0}
    for row in range(40):
        name = corpus.train.names[corpus.train.source(row)]
        counts[name] += 1
        word = {"code": "return", "books": "upon"}
        assert word[name] in text(corpus, row)
        assert word[({"code", "books"} - {name}).pop()] not in text(corpus, row)
    assert counts == {"books": 10, "code": 30}
    assert set(corpus.parts) == {"books", "code"}
    # Each source's tokenizer is the shared one; both learnt their words from it.
    assert {part.train.documents.tokenizer.identity for part in corpus.parts.values()} == {corpus.tokenizer.identity}  # type: ignore[attr-defined]


def test_documents_of_all_sources_stand_under_one_count(tmp_path: Path, folders: dict[str, Path]) -> None:
    corpus = opened(tmp_path, halves(folders))
    everything = np.concatenate([corpus.members["train"], corpus.members["validation"]])
    assert sorted(everything.tolist()) == list(range(120))
    texts = [corpus.tokenizer.decode(corpus.cache[document].tolist()) for document in range(120)]
    assert sorted(texts) == sorted(file.read_text() for folder in folders.values() for file in folder.iterdir())
    assert corpus.text_bytes("train") + corpus.text_bytes("validation") == sum(map(len, texts))
    held_out = corpus.validation
    assert held_out.tokens == sum(part.validation.tokens for part in corpus.parts.values() if part.validation)


def test_buckets_of_lengths_divide_a_source(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = str(folders["books"])
    buckets = {
        "long": MixtureSource(0.6, path=path, min_length=600),
        "short": MixtureSource(0.4, path=path, max_length=599),
    }
    corpus = opened(tmp_path, buckets)
    whole = open_corpus(
        DataSettings("text", path, tokenizer="bytes", validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    )
    assert isinstance(whole, Corpus)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(np.sort(corpus.members[split]), np.sort(whole.members[split]))
    for row in range(20):
        name = corpus.train.names[corpus.train.source(row)]
        for document, _, _ in corpus.train.pieces(row):
            assert (corpus.cache.lengths[document] >= 600) == (name == "long")
    assert len(list((tmp_path / "cache").glob("text-*"))) == len(list((tmp_path / "cache").glob("text-*.lock"))) * 2


def test_a_source_goes_on_whether_alone_or_mixed(tmp_path: Path, folders: dict[str, Path]) -> None:
    alone = open_corpus(
        DataSettings(
            "text",
            str(folders["code"]),
            tokenizer="bytes",
            validation_fraction=0.2,
            sequence_length=64,
            cache_dir=str(tmp_path / "cache"),
        ),
        seed=4,
    )
    corpus = opened(tmp_path, halves(folders))
    alone.train.begin(10)
    corpus.train.follow(alone.train.state(10))
    assert {part.name: part.rows for part in corpus.train.parts(0)} == {"books": 0, "code": 10}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a path of its own": ({"path": "x"}, r"data\.path must be left out with data\.mixture"),
    "another source": ({"source": "jsonl"}, r"data\.source must be left out"),
    "a name that metrics cannot have": ({"mixture": {"a b": MixtureSource()}}, "letters, digits and _"),
    "no such kind": ({"mixture": {"a": MixtureSource(source="recall")}}, r"data\.mixture\.a\.source must be one of"),
    "lengths that exclude each other": (
        {"mixture": {"a": MixtureSource(min_length=9, max_length=8)}},
        r"max_length must be at least 9",
    ),
    "no document of the lengths": ({"mixture": {"a": MixtureSource(min_length=10**6)}}, "documents to train on"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    changes, said = REFUSED[name]
    mixture = changes.pop("mixture", {}) or halves(folders)
    for part in mixture.values():
        part.path = str(folders["code"])
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, mixture, **changes)


def test_best_fit_pads_and_says_so(tmp_path: Path, folders: dict[str, Path]) -> None:
    corpus = opened(tmp_path, halves(folders), packing="best_fit", sequence_length=2048)
    lengths = [sum(corpus.train.row(row).lengths) for row in range(8)]
    assert max(lengths) <= 2048
    assert min(lengths) < 2048
    held_out = [corpus.validation.row(row) for row in range(corpus.validation.rows or 0)]
    assert sum(sum(row.lengths) for row in held_out) == corpus.validation.tokens
