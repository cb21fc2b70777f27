from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from longreach.parallel.mesh import Mesh
from longreach.trainer.data import sources
from longreach.trainer.data.corpus import Corpus, open_corpus
from longreach.trainer.data.packing import NO_TARGET
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.data.sources import Source
from longreach.trainer.data.token_cache import open_token_cache
from longreach.trainer.data.tokenization import held_out
from longreach.trainer.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from longreach.trainer.evaluation import sample
from longreach.trainer.evaluation.baselines import text_baselines

TEXTS = [f"document {i}\n" + f"line {i} of größe {i * i}\n" * (1 + i % 7) for i in range(40)]


def opened(tmp_path: Path, source: str = "text", **options: object) -> Corpus:
    given = {"tokenizer": "bytes", "sequence_length": 64, "cache_dir": str(tmp_path / "cache"), **options}
    return open_corpus(DataSettings(source=source, **given), seed=5)


def write_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    for i, text in enumerate(texts):
        file = folder / f"part{i % 3}" / f"{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return folder


def texts_of(corpus: Corpus) -> list[str]:
    return corpus.tokenizer.decode_documents([corpus.cache[i] for i in range(len(corpus.cache))])


def write_parquet(file: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


class TestSources:
    def test_text_is_kept_as_it_is(self, tmp_path: Path) -> None:
        texts = [*TEXTS, "carriage\r\nreturn\r\n", "\ufeffwith a mark", "<|endoftext|>"]
        folder = write_texts(tmp_path / "texts", texts)
        (folder / ".hidden").write_text("hidden")
        corpus = opened(tmp_path, path=str(folder))
        assert sorted(texts_of(corpus)) == sorted([*texts[:-2], "with a mark", texts[-1]])
        assert corpus.cache.bytes.tolist() == [len(text.encode()) for text in texts_of(corpus)]
        one_part = opened(tmp_path, path=str(folder / "part1" / "*.txt"))
        assert len(one_part.cache) == 14

    def test_jsonl(self, tmp_path: Path) -> None:
        lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]) + '\n\n{"body": null}\n')
        with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines[20:]))
        (tmp_path / "c.json").write_text("not read")
        corpus = opened(tmp_path, "jsonl", path=str(tmp_path), column="body")
        assert texts_of(corpus) == TEXTS
        assert corpus.cache.metadata["skipped"] == {"blank": 1}

    def test_parquet(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", {"text": TEXTS[:25], "n": list(range(25))})
        write_parquet(tmp_path / "b.parquet", {"text": pa.array([*TEXTS[25:], None, " "], pa.large_string())})
        corpus = opened(tmp_path, "parquet", path=str(tmp_path))
        assert texts_of(corpus) == TEXTS
        assert corpus.cache.metadata["skipped"] == {"blank": 2}

    def test_hub_is_streamed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load(name: str, subset: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
            asked.append((name, subset, split, streaming))
            return datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(40))}).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load)
        given = {"name": "owner/name", "subset": "en", "max_documents": 30, "tokenizer": "bpe", "vocabulary_size": 300}
        for _ in range(2):
            corpus = opened(tmp_path, "hub", **given)
        assert asked == [("owner/name", "en", "train", True)]
        assert texts_of(corpus) == TEXTS[:30]
        assert corpus.tokenizer.vocabulary_size == 300
        with pytest.raises(ValueError, match=r"data\.column must be a field of owner/name; got 'body'. It has text, n"):
            opened(tmp_path, "hub", **given, column="body")
        with pytest.raises(ValueError, match=r"data\.column must be a field of text; got 'n', which is int"):
            opened(tmp_path, "hub", **given, column="n")

    def test_hub_out_of_reach(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: object, **__: object) -> None:
            raise ConnectionError("offline mode is enabled")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(ValueError, match=r"data\.name must be .* got owner/name .*offline mode.*HF_HUB_OFFLINE"):
            opened(tmp_path, "hub", name="owner/name")
        assert not list((tmp_path / "cache").glob("*.building"))

    @pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 6)])
    def test_pretokenized(self, tmp_path: Path, kind: pa.DataType) -> None:
        rows = [[i, 1, 2, 3, 4, 256] for i in range(9)]
        rows += [[9, 9, 9, 9, 9, 9], [50, 51, 256, 60, 61, 62], [256] * 6]
        write_parquet(tmp_path / "a.parquet", {"input_ids": pa.array([*rows, None], kind)})
        corpus = opened(tmp_path, "pretokenized", path=str(tmp_path))
        documents = [corpus.cache[i].tolist() for i in range(len(corpus.cache))]
        assert documents == [*rows[:9], [9] * 6 + [256], [50, 51, 256], [60, 61, 62, 256]]
        assert corpus.cache.bytes.tolist() == [5] * 9 + [6, 2, 3]

    def test_stdlib(self, tmp_path: Path) -> None:
        corpus = opened(tmp_path, "stdlib", path=None)
        read = [Path(name).read_bytes() for name, _, _ in sources.open_source(DataSettings()).identity["files"]]
        kept = [content for content in read if content.strip()]
        assert corpus.cache.bytes.tolist() == [len(content.removeprefix(b"\xef\xbb\xbf")) for content in kept]
        own = kept.index(Path(json.__file__).read_bytes())
        assert corpus.tokenizer.decode(corpus.cache[own]).encode() == kept[own]
        names = [Path(name) for name, _, _ in sources.open_source(DataSettings()).identity["files"]]
        assert names == sorted(names)
        assert not {"test", "tests", "idle_test", "site-packages", "cp1252.py"} & {p for n in names for p in n.parts}
        assert "utf_8.py" in {name.name for name in names}
        assert corpus.text_bytes("train") + corpus.text_bytes("validation") > sources.STDLIB_BYTES

    def test_slim_standard_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(write_texts(tmp_path / "lib")))
        with pytest.raises(ValueError, match=r"data=stdlib must find at least 4,000,000 bytes.*Use a full Python"):
            opened(tmp_path, "stdlib")

    def test_no_long_source_fills_step_after_step(self, tmp_path: Path) -> None:
        made = opened(tmp_path, "stdlib", path=None, sequence_length=4096).train
        filled = []
        for step in range(made.tokens // 4096 // 8):
            tokens: Counter[int] = Counter()
            for row in range(8 * step, 8 * step + 8):
                for document, _, n in made.pieces(row):
                    tokens[document] += n
            filled.append(max(tokens.values()) > 8 * 4096 / 2)
        assert len(filled) > 200
        assert np.mean(filled) <= 0.1


class TestCorpus:
    def test_a_sample_without_a_prompt_begins_where_a_document_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        corpus = opened(tmp_path, path=str(write_texts(tmp_path / "texts")), sequence_length=8)
        monkeypatch.setattr(sample, "generate", lambda *_, **__: [])
        engine: Any = SimpleNamespace(module=torch.nn.Identity(), device="cpu", mesh=Mesh.create())
        text = sample.draw_sample(engine, corpus, "", tokens=4, temperature=0.0, seed=0)
        held = corpus.tokenizer.decode_documents([corpus.cache[int(i)] for i in corpus.validation.members])
        assert len(text) > 8  # more than a row
        assert any(document.startswith(text) for document in held)

    def test_split_and_counts(self, tmp_path: Path) -> None:
        folder = write_texts(tmp_path / "texts")
        corpus = opened(tmp_path, path=str(folder), validation_fraction=0.2)
        train, validation = corpus.train.members.tolist(), corpus.validation.members.tolist()
        assert sorted(train + validation) == list(range(40))
        assert 2 <= len(validation) <= 16
        texts = texts_of(corpus)
        for split, members in (("train", train), ("validation", validation)):
            size = sum(len(texts[i].encode()) for i in members)
            assert corpus.text_bytes(split) == size
            # Bytes are tokens here, and each document has one target for every token but its first: its bytes.
            assert corpus.stream(split).targets == size
            assert corpus.bytes_per_token(split) == 1.0
        # The split follows the content: other file names, and other documents beside it, leave a document where it is.
        held = {texts[i] for i in validation}
        renamed = opened(tmp_path, path=str(write_texts(tmp_path / "other", TEXTS[::-2])), validation_fraction=0.2)
        again = {texts_of(renamed)[i] for i in renamed.validation.members}
        assert again == held & set(TEXTS[::-2])

    def test_equal_documents_stay_on_one_side(self) -> None:
        hashes = np.array([5, 5, 9, 9, 9], np.uint64)
        assert held_out(hashes, 1e-9).tolist() == [True, True, False, False, False]
        assert held_out(hashes, 1 - 1e-9).tolist() == [True, True, False, False, False]
        with pytest.raises(ValueError, match="at least 2 different documents"):
            held_out(hashes[:2], 0.5)

    def test_a_single_document_is_cut(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        file = tmp_path / "book.txt"
        file.write_text("".join(TEXTS))
        corpus = opened(tmp_path, path=str(file))
        (train,), (validation,) = corpus.train.members, corpus.validation.members
        texts = texts_of(corpus)
        assert texts[train] + texts[validation] == "".join(TEXTS)
        assert 0 < len(texts[validation]) < 0.1 * len("".join(TEXTS))
        assert texts[validation].startswith(("line", "document"))
        assert "its last 5% is held out" in caplog.text
        file.write_text("x")
        with pytest.raises(ValueError, match="at least 2 documents"):
            opened(tmp_path, path=str(file))

    def test_fingerprint_is_of_the_content(self, tmp_path: Path) -> None:
        first = opened(tmp_path, path=str(write_texts(tmp_path / "a")))
        moved = opened(tmp_path, path=str(write_texts(tmp_path / "b")), cache_dir=str(tmp_path / "elsewhere"))
        assert first.fingerprint == moved.fingerprint
        assert moved.train.resume(first.train.state(3)) == 3
        changed = opened(tmp_path, path=str(write_texts(tmp_path / "c", [*TEXTS[:-1], "other"])))
        split = opened(tmp_path, path=str(tmp_path / "a"), validation_fraction=0.3)
        for other in (changed, split):
            with pytest.raises(ValueError, match="data fingerprint must be"):
                other.train.resume(first.train.state(3))

    def test_bpe_learns_from_training_documents_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        learnt: list[str] = []

        def train(batches: Iterator[list[str]], vocabulary_size: int) -> Tokenizer:
            kept = list(batches)
            learnt.extend(text for batch in kept for text in batch)
            return train_bpe(kept, vocabulary_size)

        monkeypatch.setattr("longreach.trainer.data.tokenization.train_bpe", train)
        monkeypatch.setattr("longreach.trainer.data.tokenization.BYTES_AT_ONCE", 200)
        given = {"path": str(write_texts(tmp_path / "texts")), "tokenizer": "bpe", "vocabulary_size": 300}
        corpus = opened(tmp_path, **given)
        texts = texts_of(corpus)
        assert learnt == [texts[i] for i in corpus.train.members]
        assert len(learnt) < len(texts)
        again = opened(tmp_path, **given, cache_dir=str(tmp_path / "again"))
        assert again.fingerprint == corpus.fingerprint
        # Of more text than can be held, a choice is learnt from.
        learnt.clear()
        monkeypatch.setattr("longreach.trainer.data.tokenization.BPE_BYTES", 2000)
        opened(tmp_path, **given, cache_dir=str(tmp_path / "limited"))
        assert 500 < sum(map(len, learnt)) < 4000

    def test_a_changed_file_is_read_anew(self, tmp_path: Path) -> None:
        folder = write_texts(tmp_path / "texts")
        before = opened(tmp_path, path=str(folder))
        (folder / "part0" / "000.txt").write_text("changed and longer than it was before\n" * 3)
        assert opened(tmp_path, path=str(folder)).fingerprint != before.fingerprint
        assert len(list((tmp_path / "cache").glob("text-*/metadata.json"))) == 2

    def test_many_batches_of_documents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = opened(tmp_path, path=str(write_texts(tmp_path / "texts")))
        monkeypatch.setattr("longreach.trainer.data.tokenization.BYTES_AT_ONCE", 200)
        for tokenizer in ("bytes", "bpe"):
            pieces = opened(tmp_path, path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "b"), tokenizer=tokenizer)
            assert texts_of(pieces) == texts_of(whole)
        np.testing.assert_array_equal(pieces.cache.held_out, whole.cache.held_out)


def bytes_with_bos(folder: Path) -> Path:
    """The byte tokenizer with a `<s>`, id 257, that its template puts before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.library.add_special_tokens(["<s>"])
    tokenizer.library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(folder)
    return folder


class TestBos:
    def test_documents_begin_with_it_and_bits_per_byte_do_not_count_it(self, tmp_path: Path) -> None:
        folder, name = write_texts(tmp_path / "texts"), str(bytes_with_bos(tmp_path / "tokenizer"))
        corpus, without = (opened(tmp_path, path=str(folder), tokenizer=name, bos=bos) for bos in ("auto", "false"))
        assert corpus.fingerprint != without.fingerprint
        assert len(list((tmp_path / "cache").glob("text-*/metadata.json"))) == 2
        assert texts_of(corpus) == texts_of(without)
        for i, text in enumerate(texts_of(corpus)):
            assert corpus.cache[i].tolist() == [257, *text.encode(), 256]
            assert without.cache[i].tolist() == [*text.encode(), 256]
        for split in ("train", "validation"):
            stream, size = corpus.stream(split), corpus.text_bytes(split)
            # Every byte of the text is a target now, the first too, and so is each document's end.
            assert stream.targets == size + len(stream.members)
            assert corpus.bytes_per_token(split) == size / stream.targets
            assert without.text_bytes(split) == size
        # The mean over all rows, times targets a byte, is the sum of losses over the bytes of text.
        rows = [corpus.validation.row(number) for number in range(corpus.validation.rows or 0)]
        assert sum(int((row.targets != NO_TARGET).sum()) for row in rows) == corpus.validation.targets
        assert not any((row.targets == 257).any() for row in rows)

    def test_a_document_that_a_row_cuts_goes_on_without_it(self, tmp_path: Path) -> None:
        name = str(bytes_with_bos(tmp_path / "tokenizer"))
        corpus = opened(tmp_path, path=str(write_texts(tmp_path / "texts")), tokenizer=name)
        stream = corpus.validation
        rows = [stream.row(number) for number in range(stream.rows or 0)]
        together = np.concatenate([row.tokens[: sum(row.lengths)] for row in rows])
        expected = np.concatenate([corpus.cache[int(i)] for i in stream.members])
        assert np.sort(together).tolist() == np.sort(expected).tolist()
        assert sum(len(row.lengths) for row in rows) > (together == 257).sum() == len(stream.members)

    def test_ids_stay_as_they_are(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        name = str(bytes_with_bos(tmp_path / "tokenizer"))
        rows = [[1, 2, 3, 256, 257, 256, 257, 4, 256], [5, 6], [257, 256]]
        for bos, begun in (("auto", (257,)), ("true", (257,)), ("false", ())):
            write_parquet(tmp_path / "a.parquet", {"input_ids": rows})
            corpus = opened(tmp_path, "pretokenized", path=str(tmp_path / "a.parquet"), tokenizer=name, bos=bos)
            found = [corpus.cache[i].tolist() for i in range(len(corpus.cache))]
            kept = [[1, 2, 3, 256], *([] if begun else [[257, 256]]), [257, 4, 256], [5, 6, 256]]
            assert found == [*kept, *([] if begun else [[257, 256]])]
            assert corpus.tokenizer.beginning == begun
            assert caplog.text == ""
        write_parquet(tmp_path / "b.parquet", {"input_ids": rows[1:2] * 3 + [[7, 8]]})
        opened(tmp_path, "pretokenized", path=str(tmp_path / "b.parquet"), tokenizer=name)
        assert "data.bos: prompts begin with BOS and no document does; data.bos=false" in caplog.text

    def test_counting_models_do_not_count_it(self, tmp_path: Path) -> None:
        folder, name = write_texts(tmp_path / "texts"), str(bytes_with_bos(tmp_path / "tokenizer"))
        corpus, without = (opened(tmp_path, path=str(folder), tokenizer=name, bos=bos) for bos in ("auto", "false"))
        counts = np.ones(258)
        for document in corpus.train.members:
            np.add.at(counts, corpus.cache[int(document)][1:], 1)
        scored = np.concatenate([corpus.cache[int(document)][1:] for document in corpus.validation.members])
        expected = -np.log2(counts / counts.sum())[scored].sum() / corpus.text_bytes("validation")
        found = text_baselines(corpus)
        assert found.token_unigram == pytest.approx(expected, rel=1e-12)
        assert found.byte_unigram == text_baselines(without).byte_unigram

    def test_what_it_may_be(self, tmp_path: Path) -> None:
        path = str(write_texts(tmp_path / "texts"))
        for options, message in (
            ({"bos": "yes"}, r"data\.bos must be one of auto, true, false; got yes\. Choose one"),
            ({"bos": "True"}, r"data\.bos must be auto or false .*; got true with data\.tokenizer=bytes"),
            ({"bos": "true", "tokenizer": "bpe"}, r"data\.bos must be auto or false .* data\.tokenizer=bpe"),
        ):
            with pytest.raises(ValueError, match=message):
                opened(tmp_path, path=path, **options)
        assert opened(tmp_path, path=path, bos="False").tokenizer.beginning == ()


class TestBadInput:
    @pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "pretokenized"])
    def test_nothing_there(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"data\.path must be given with data="):
            opened(tmp_path, source)
        for path in ("missing", "missing/*.x"):
            with pytest.raises(
                ValueError, match=r"data\.path must be a file, a folder or a pattern that matches files"
            ):
                opened(tmp_path, source, path=str(tmp_path / path))
        with pytest.raises(ValueError, match=r"data\.path must hold at least one .*which holds none"):
            opened(tmp_path, source, path=str(tmp_path / "empty"))

    def test_invalid_utf8_is_counted_and_skipped(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = write_texts(tmp_path / "texts", [*TEXTS, "", " \n\t"])
        (folder / "latin.txt").write_bytes("größe".encode("latin-1"))
        (folder / "picture.png").write_bytes(bytes(range(256)))
        for _ in range(2):  # the warning belongs to the data: a cache that is already there repeats it
            caplog.clear()
            corpus = opened(tmp_path, path=str(folder))
            warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
            invalid = f"{folder}/latin.txt, {folder}/picture.png"
            blank = f"{folder}/part1/040.txt, {folder}/part2/041.txt"
            assert warnings == [
                f"data.path: 2 documents are not valid UTF-8 and were left out ({invalid})",
                f"data.path: 2 documents are blank and were left out ({blank})",
            ]
        assert sorted(texts_of(corpus)) == sorted(TEXTS)
        assert corpus.cache.metadata["skipped"] == {"blank": 2, "invalid UTF-8": 2}

    @pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
    def test_nothing_readable(self, tmp_path: Path, tokenizer: str) -> None:
        (tmp_path / "latin.txt").write_bytes(b"\xff")
        (tmp_path / "blank.txt").write_bytes(b"\n\n")
        match = r"data\.path must hold readable text; got .*\(1 blank, 1 invalid UTF-8\)\. Convert it to UTF-8, or"
        with pytest.raises(ValueError, match=match):
            opened(tmp_path, path=str(tmp_path / "*.txt"), tokenizer=tokenizer)
        assert [file.suffix for file in (tmp_path / "cache").iterdir() if file.is_dir()] == []

    @pytest.mark.parametrize(
        ("line", "match"),
        [
            ('{"text": "cut', r"data\.path must hold one JSON object a line; got .*a\.jsonl:3: Unterminated string"),
            ('["text"]', r"data\.path must hold one JSON object a line; got .*a\.jsonl:3: list"),
            ('{"body": "x", "n": 1}', r"data\.column must be .*'text', which .*a\.jsonl:3 lacks. It has body, n"),
            ('{"text": 7}', r"data\.column must be a field of text; got 'text', which is int in .*a\.jsonl:3"),
        ],
    )
    def test_jsonl_lines(self, tmp_path: Path, line: str, match: str) -> None:
        (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n')
        with pytest.raises(ValueError, match=match):
            opened(tmp_path, "jsonl", path=str(tmp_path / "a.jsonl"))

    def test_jsonl_that_is_no_text(self, tmp_path: Path) -> None:
        good = b"\n".join(json.dumps({"text": text}).encode() for text in TEXTS)
        (tmp_path / "a.jsonl").write_bytes(good + b'\n{"text": "\xff"}\n{"text": "\\ud83d alone"}\n')
        corpus = opened(tmp_path, "jsonl", path=str(tmp_path / "a.jsonl"))
        assert texts_of(corpus) == TEXTS
        assert corpus.cache.metadata["skipped"] == {"invalid UTF-8": 2}
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good)[:-9])
        with pytest.raises(ValueError, match=r"data\.path must be readable; got .*b\.jsonl\.gz"):
            opened(tmp_path, "jsonl", path=str(tmp_path / "b.jsonl.gz"))

    def test_parquet_columns(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", {"body": TEXTS, "n": list(range(40))})
        for source, column in (("parquet", "text"), ("pretokenized", "input_ids")):
            with pytest.raises(ValueError, match=rf"data\.column must .*{column}.*a\.parquet lacks. It has body, n"):
                opened(tmp_path, source, path=str(file))
        with pytest.raises(ValueError, match=r"data\.column must be a column of text; got 'n', which is int64"):
            opened(tmp_path, "parquet", path=str(file), column="n")
        with pytest.raises(ValueError, match=r"data\.column must be a column of integer lists"):
            opened(tmp_path, "pretokenized", path=str(file), column="body")
        (tmp_path / "b.parquet").write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"data\.path must be readable; got .*b\.parquet"):
            opened(tmp_path, "parquet", path=str(tmp_path / "b.parquet"), column="body")

    @pytest.mark.parametrize(
        ("ids", "found"), [([1, 257], "ids from 1 to 257"), ([-1, 5], "ids from -1"), ([1, None], "an empty id")]
    )
    def test_ids_outside_the_vocabulary(self, tmp_path: Path, ids: list, found: str) -> None:
        file = write_parquet(tmp_path / "a.parquet", {"input_ids": [[1, 2], ids]})
        with pytest.raises(ValueError, match=rf"ids of data\.tokenizer, 0 to 256; got {found}"):
            opened(tmp_path, "pretokenized", path=str(file))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"source": "web"}, r"data\.source must be one of stdlib, text"),
            ({"source": "stdlib", "path": "x"}, r"data\.path must be left out with data=stdlib"),
            ({"column": "text"}, r"data\.column must be left out with data=text"),
            ({"max_documents": 3}, r"data\.max_documents must be left out with data=text"),
            ({"source": "hub"}, r"data\.name must be given"),
            ({"source": "hub", "name": "a/b", "max_documents": 0}, r"data\.max_documents must be at least 1"),
            ({"validation_fraction": 0.0}, r"data\.validation_fraction must lie between 0 and 1"),
            ({"vocabulary_size": 999}, r"data\.vocabulary_size must be left out with data\.tokenizer=bytes"),
            ({"tokenizer": "bpe", "vocabulary_size": 100}, r"data\.vocabulary_size must be at least 257"),
            ({"source": "pretokenized", "tokenizer": "bpe"}, r"data\.tokenizer must be the path or name"),
            ({"tokenizer": "/no/such/tokenizer"}, r"data\.tokenizer must be a file or directory that exists"),
        ],
    )
    def test_settings(self, tmp_path: Path, options: dict, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            opened(tmp_path, **options)

    def test_cache_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=r"data\.cache_dir must be a folder with room"):
            opened(tmp_path, path=str(write_texts(tmp_path / "texts")), cache_dir=str(tmp_path / "file" / "cache"))

    def test_damaged_cache(self, tmp_path: Path) -> None:
        folder = write_texts(tmp_path / "texts")
        opened(tmp_path, path=str(folder))
        (tokens,) = (tmp_path / "cache").glob("*/tokens.arrow")
        tokens.write_bytes(tokens.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"data\.cache_dir must hold whole token caches; got .*Delete that folder"):
            opened(tmp_path, path=str(folder))


class Slow:
    """A source that waits to be let go, and counts how often it is read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reads, self.error = 0, error
        self.reading, self.go = threading.Event(), threading.Event()
        self.source = Source({}, self.read, "data.path", "somewhere")

    def read(self, skipped: Counter[str]) -> Iterator[str]:
        self.reads += 1
        self.reading.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        yield from TEXTS

    def open(self, directory: Path, wait_s: float = 20.0) -> list[str]:
        options = {"vocabulary_size": 300, "validation_fraction": 0.1, "wait_s": wait_s}
        cache = open_token_cache(directory, self.source, byte_tokenizer(), **options)
        return cache.tokenizer.decode_documents([cache[i] for i in range(len(cache))])


def together(count: int, call: object, *arguments: object) -> tuple[list[threading.Thread], list]:
    results: list = []

    def run() -> None:
        try:
            results.append(call(*arguments))
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def wait_for(text: str, caplog: pytest.LogCaptureFixture, times: int) -> None:
    deadline = time.monotonic() + 20
    while caplog.text.count(text) < times:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


class TestBuildingOnce:
    @pytest.mark.parametrize("error", [None, ValueError("data.path must be better"), OSError("disk full")])
    def test_one_builds_and_the_others_wait(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception | None
    ) -> None:
        caplog.set_level(logging.INFO, "longreach")
        slow = Slow(error)
        threads, results = together(3, slow.open, tmp_path / "c" / "key")
        wait_for("waiting for the token cache", caplog, 2)
        slow.go.set()
        for thread in threads:
            thread.join(20)
        assert slow.reads == 1
        if error is None:
            assert results == [TEXTS] * 3
        else:
            assert len(results) == 3
            assert all(str(error) in result for result in results)
            # A later run does not take that failure for its own.
            slow.error = None
            assert slow.open(tmp_path / "c" / "key") == TEXTS
            assert slow.reads == 2
        assert not list((tmp_path / "c").glob("*.building"))

    def test_a_builder_that_dies_leaves_the_work_to_the_next(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "longreach")
        program = (
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
        )
        lock = tmp_path / "key.lock"
        with subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            slow = Slow()
            slow.go.set()
            with pytest.raises(ValueError, match=r"data\.cache_dir must be free within 0 s"):
                slow.open(tmp_path / "key", wait_s=0.2)
            threads, results = together(1, slow.open, tmp_path / "key")
            wait_for("waiting for the token cache", caplog, 2)
            holder.kill()
            threads[0].join(20)
        assert results == [TEXTS]

    @pytest.mark.slow
    def test_two_processes(self, tmp_path: Path) -> None:
        write_texts(tmp_path / "texts", [text * 50 for text in TEXTS])
        program = (
            "import logging, sys; logging.basicConfig(level='INFO');"
            "from longreach.trainer.data.corpus import open_corpus;"
            "from longreach.trainer.data.settings import DataSettings;"
            "c = open_corpus(DataSettings('text', sys.argv[1], vocabulary_size=300), sys.argv[2], 1);"
            "print(c.fingerprint, c.train.row(7).tokens.sum())"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "texts"), str(tmp_path / "cache")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        both = [subprocess.Popen(command, **pipes) for _ in range(2)]
        ended = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], ended
        assert ended[0][0] == ended[1][0] != ""
        assert sum("into the token cache" in log for _, log in ended) == 1
