"""Documents from files as people have them, and from a hub that fails."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longreach.trainer.data import hub
from longreach.trainer.data.corpus import Corpus, open_corpus
from longreach.trainer.data.settings import DataSettings

TEXTS = [f"document {i} of größe {i * i}\n" * (1 + i % 3) for i in range(12)]
LINES = [json.dumps({"text": text, "url": f"https://example.org/{i}"}) for i, text in enumerate(TEXTS)]


def opened(tmp_path: Path, source: str, path: object = None, **options: object) -> Corpus:
    given = {"tokenizer": "bytes", "sequence_length": 64, "cache_dir": str(tmp_path / "cache"), **options}
    return open_corpus(DataSettings(source=source, path=None if path is None else str(path), **given), seed=5)


def texts_of(corpus: Corpus) -> list[str]:
    return corpus.tokenizer.decode_documents([corpus.cache[i] for i in range(len(corpus.cache))])


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # as parallel and seekable compressors write
PACKED = {
    "plain": lambda content: content,
    "gzip": gzip.compress,
    "two gzip members": lambda content: gzip.compress(content[:100]) + gzip.compress(content[100:]),
    "zstd": zstd,
    "two zstd frames": lambda content: SKIPPABLE + zstd(content[:100]) + SKIPPABLE + zstd(content[100:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


class TestFiles:
    @pytest.mark.parametrize("packed", PACKED)
    def test_compression_is_told_by_content(self, tmp_path: Path, packed: str) -> None:
        content = "\n".join(LINES).encode()
        folder = tmp_path / "data"
        folder.mkdir()
        names = ["a.jsonl", "b.JSONL.GZ", "c.jsonl.zst", "d.NDJSON.Zst", "c4-train.00000-of-01024.json.gz", "e.json"]
        for number, name in enumerate(names):
            (folder / name).write_bytes(PACKED[packed](content.replace(b"document", f"document {number}".encode())))
        corpus = opened(tmp_path, "jsonl", folder)
        assert len(texts_of(corpus)) == len(names) * len(TEXTS)
        assert len(set(texts_of(corpus))) == len(names) * len(TEXTS)
        (tmp_path / "texts").mkdir()
        for number, text in enumerate(TEXTS):
            (tmp_path / "texts" / f"{number:02}.any").write_bytes(PACKED[packed](text.encode()))
        assert texts_of(opened(tmp_path, "text", tmp_path / "texts")) == TEXTS

    @pytest.mark.parametrize("packed", ["gzip", "zstd", "bzip2", "xz"])
    def test_a_packed_file_that_is_cut_off(self, tmp_path: Path, packed: str) -> None:
        content = PACKED[packed]("\n".join(LINES * 9).encode() + os.urandom(999).hex().encode())
        (tmp_path / "a.jsonl").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"data\.path must be readable; got .*a\.jsonl"):
            opened(tmp_path, "jsonl", tmp_path / "a.jsonl")

    def test_links_are_followed_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        outside, folder = tmp_path / "outside", tmp_path / "data"
        for place, texts in ((outside / "deep", TEXTS[:4]), (folder / "real", TEXTS[4:])):
            place.mkdir(parents=True)
            for text in texts:
                (place / f"{TEXTS.index(text):02}.txt").write_text(text)
        (folder / "also").symlink_to("real")
        (folder / "corpus").symlink_to(outside)
        (folder / "round").symlink_to(folder)
        (outside / "deep" / "up").symlink_to(tmp_path)
        (folder / "copy.txt").symlink_to(folder / "real" / "05.txt")
        (folder / "lost.txt").symlink_to(tmp_path / "nowhere")
        os.mkfifo(folder / "pipe")
        corpus = opened(tmp_path, "text", folder)
        assert sorted(texts_of(corpus)) == sorted(TEXTS)
        assert "1 file passed over: link to nothing (lost.txt)" in caplog.text
        assert "1 file passed over: no regular file (pipe)" in caplog.text
        assert "read under another name (" in caplog.text
        for name in ("also", "round", "copy.txt"):
            assert name in caplog.text
        caplog.clear()
        by_pattern = opened(tmp_path, "text", folder / "**" / "*.txt")
        assert sorted(texts_of(by_pattern)) == sorted(TEXTS)

    def test_every_file_that_is_passed_over_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = tmp_path / "data"
        (folder / "sub").mkdir(parents=True)
        (folder / ".git").mkdir()
        (folder / "a.jsonl").write_text("\n".join(LINES))
        (folder / "info.json").write_text('{"description": "no lines"}')
        (folder / "pretty.json").write_text('[\n  {"text": "a list"}\n]')
        (folder / ".hidden.jsonl").write_text(LINES[0])
        for number in range(7):
            (folder / "sub" / f"{number}.csv").write_text("a,b")
        for _ in range(2):  # a cache that is there says it again
            caplog.clear()
            corpus = opened(tmp_path, "jsonl", folder)
            assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
                "data.path: 2 files passed over: hidden (.git/, .hidden.jsonl)",
                "data.path: 2 files passed over: not JSON lines with the field 'text' (info.json, pretty.json)",
                "data.path: 7 files passed over: name does not end in .jsonl or .ndjson or .json, with or without "
                ".gz or .zst (sub/0.csv, sub/1.csv, sub/2.csv, sub/3.csv, sub/4.csv, ...)",
            ]
        assert texts_of(corpus) == TEXTS
        with pytest.raises(ValueError, match=r"at least one \.parquet file; got .* holds none \(.*a\.jsonl, .*Name"):
            opened(tmp_path, "parquet", folder)

    @pytest.mark.parametrize(
        "kind",
        [
            pa.string_view(),
            pa.large_string(),
            pa.dictionary(pa.int32(), pa.string()),
            pa.dictionary(pa.int8(), pa.large_string()),
            pa.binary(),
            pa.large_binary(),
            pa.json_(),
        ],
        ids=str,
    )
    def test_text_columns_of_every_type(self, tmp_path: Path, kind: pa.DataType) -> None:
        texts = [*TEXTS, None, TEXTS[0]]
        if pa.types.is_dictionary(kind):
            column = pa.array(texts, pa.string()).dictionary_encode().cast(kind)
        elif isinstance(kind, pa.BaseExtensionType):
            column = pa.ExtensionArray.from_storage(kind, pa.array(texts, kind.storage_type))
        else:
            column = pa.array(texts, kind)
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert texts_of(opened(tmp_path, "parquet", tmp_path / "a.parquet")) == [*TEXTS, TEXTS[0]]

    @pytest.mark.parametrize("kind", [pa.list_view(pa.int32()), pa.large_list_view(pa.uint16())], ids=str)
    def test_views_of_ids(self, tmp_path: Path, kind: pa.DataType) -> None:
        rows = [[i, 1, 2, 256] for i in range(9)]
        pq.write_table(pa.table({"input_ids": pa.array(rows, kind)}), tmp_path / "a.parquet")
        corpus = opened(tmp_path, "pretokenized", tmp_path / "a.parquet")
        assert [corpus.cache[i].tolist() for i in range(len(corpus.cache))] == rows


class Hub:
    """A hub that breaks before the documents of some numbers, once for each time they are listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, breaks: list[int]) -> None:
        self.breaks, self.given, self.waited = breaks, Counter[int](), 0.0
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(hub.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.waited += seconds

    def load(self, name: str, subset: str | None, **_: object) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(self.examples, gen_kwargs={"shards": [0, 1, 2, 3]})

    def examples(self, shards: list[int]) -> Iterator[dict]:
        for number in (10 * shard + place for shard in shards for place in range(10)):
            if number in self.breaks:
                self.breaks.remove(number)
                raise ConnectionError("the connection was reset")
            self.given[number] += 1
            yield {"text": f"text {number}"}


ALL = [f"text {number}" for number in range(40)]


class TestHub:
    @pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
    @pytest.mark.parametrize("every", [3, 1000])
    def test_one_that_fails_is_gone_on_with(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tokenizer: str,
        every: int,
    ) -> None:
        monkeypatch.setattr(hub, "STATE_EVERY", every)
        stand_in = Hub(monkeypatch, [7, 7, 20, 39])
        assert texts_of(opened(tmp_path, "hub", name="a/b", tokenizer=tokenizer)) == ALL
        assert stand_in.waited == 1 + 2 + 1 + 1  # the wait begins anew where something came
        assert "a/b failed at document 7 (ConnectionError: the connection was reset); going on from" in caplog.text
        # Where the place in the stream is noted, files before it are not read again.
        assert stand_in.given[0] == (3 if every == 3 else 5)
        assert not list((tmp_path / "cache").glob("*.documents"))

    def test_a_second_call_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in = Hub(monkeypatch, [30] * 100)
        refusal = r"data\.name must be .*got a/b.*, at document 30: ConnectionError: .*the 30 documents before it"
        with pytest.raises(ValueError, match=refusal):
            opened(tmp_path, "hub", name="a/b", max_documents=35)
        assert stand_in.waited == sum(hub.WAITS_S)
        (kept,) = (tmp_path / "cache").glob("*.documents")
        kept.write_bytes(kept.read_bytes() + b'[30, "cut of')  # as a process that is killed leaves it
        stand_in.breaks.clear()
        read = []
        read_from = hub.HubDataset.read_from

        def noted(self: hub.HubDataset, first: int) -> Iterator[str]:
            read.append(first)
            return read_from(self, first)

        monkeypatch.setattr(hub.HubDataset, "read_from", noted)
        assert texts_of(opened(tmp_path, "hub", name="a/b", max_documents=35)) == ALL[:35]
        assert read == [30]
        assert not kept.exists()

    def test_a_wrong_name_is_told_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in = Hub(monkeypatch, [0] * 100)
        with pytest.raises(ValueError, match=r"data\.name must be .*HF_HUB_OFFLINE$"):
            opened(tmp_path, "hub", name="a/b")
        assert stand_in.waited == 0
