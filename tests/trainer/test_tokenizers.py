from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from longreach.trainer.tokenizers import END_OF_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

TEXTS = [f"def function_{i}(argument):\n    return argument * {i}  # <|endoftext|> größer\r\n" for i in range(50)]
TRICKY = f"a{END_OF_TEXT}b \t\r\n\x00 世界 é 🙂{END_OF_TEXT}"
BPE = train_bpe([TEXTS], 380)
BYTES = byte_tokenizer()


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
class TestRoundTrip:
    @settings(deadline=None, max_examples=50)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_text(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids
        assert all(0 <= i < tokenizer.vocabulary_size for i in ids)

    def test_names_of_special_tokens_are_text(self, tokenizer: Tokenizer) -> None:
        documents = tokenizer.encode_documents([TRICKY, "x"])
        assert documents[0].dtype == np.int64
        for text, ids in zip([TRICKY, "x"], documents, strict=True):
            assert ids.tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]
        assert (documents[0] == tokenizer.end_of_text).sum() == 1
        assert tokenizer.decode_documents(documents) == [TRICKY, "x"]

    def test_saved_and_loaded(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path / "a")
        loaded = load_tokenizer(tmp_path / "a")
        loaded.save(tmp_path / "b")
        for again in (loaded, load_tokenizer(tmp_path / "b" / "tokenizer.json")):
            assert again.identity == tokenizer.identity
            assert again.vocabulary_size == tokenizer.vocabulary_size
            assert again.encode_documents([TRICKY])[0].tolist() == tokenizer.encode_documents([TRICKY])[0].tolist()


def test_byte_ids_are_bytes() -> None:
    assert BYTES.vocabulary_size == 257
    assert BYTES.encode(TRICKY) == list(TRICKY.encode())
    assert BYTES.decode([0xE4, 256]) == "\ufffd"


def test_bpe_depends_on_the_texts_alone() -> None:
    assert train_bpe([[text] for text in TEXTS], 380).identity == BPE.identity
    assert BPE.vocabulary_size == 380
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert BPE.library.token_to_id("Ġreturn") is not None


def test_bpe_must_hold_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"data\.vocabulary_size must be at least 257"):
        train_bpe([TEXTS], 256)


def foreign(path: Path, end: str = "</s>", config: dict | None = None) -> Path:
    """A tokenizer like others' files: adds a start token, truncates, pads, and has holes in its ids."""
    library = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1, end: 2, "hello": 3, "world": 9}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", end])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(2)
    library.enable_padding(length=8)
    path.mkdir(parents=True, exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_foreign_tokenizer_adds_and_cuts_nothing(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    for name in (path, path / "tokenizer.json"):
        loaded = load_tokenizer(name)
        assert loaded.encode("hello world hello") == [3, 9, 3]
        assert loaded.encode_documents(["hello world hello", "hello"])[1].tolist() == [3, 2]
        assert loaded.vocabulary_size == 10
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("hello " * 20) == [3] * 20


@pytest.mark.parametrize("declared", ["world", {"content": "world", "lstrip": False}])
def test_end_of_text_is_the_declared_one(tmp_path: Path, declared: str | dict) -> None:
    loaded = load_tokenizer(foreign(tmp_path, config={"eos_token": declared, "chat": "kept"}))
    assert loaded.end_of_text == 9
    loaded.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat"] == "kept"


def test_a_name_is_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(path))
    assert load_tokenizer("owner/name").encode("hello") == [3]

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"data\.tokenizer must be .* got 'owner/name': OSError: offline mode"):
        load_tokenizer("owner/name")


def test_what_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither an eos_token"):
        load_tokenizer(foreign(tmp_path / "no_end", end="<stop>"))
    with pytest.raises(ValueError, match="must be a file or directory that exists"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"must have a tokenizer\.json"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="must be a file of the tokenizers library"):
        load_tokenizer(broken)
