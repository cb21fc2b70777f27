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

from longreach.trainer.data.tokenizers import END_OF_TEXT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

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
        assert documents[0].dtype == np.uint16
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


def test_a_foreign_tokenizer_begins_as_its_template_says_and_cuts_nothing(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    for name in (path, path / "tokenizer.json"):
        loaded = load_tokenizer(name)
        assert loaded.encode("hello world hello") == [3, 9, 3]
        assert loaded.encode_documents(["hello world hello", "hello"])[1].tolist() == [0, 3, 2]
        assert loaded.encode_prompt("hello") == [0, 3]
        assert loaded.vocabulary_size == 10
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("hello " * 20) == [3] * 20


def byte_level(path: Path, processor: object, config: dict | None = None) -> Path:
    """A byte-level BPE as most models have it, with another's post-processor."""
    library = tokenizers.Tokenizer.from_str(BPE.library.to_str())
    library.add_special_tokens(["<s>", "</s>", "[gMASK]"])
    library.post_processor = processor  # type: ignore[assignment]
    path.mkdir(parents=True, exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    if config is not None:
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
        (path / "tokenizer_config.json").write_text(json.dumps(told))
    return path


def template(*before: tuple[str, int], after: tuple[tuple[str, int], ...] = ()) -> processors.PostProcessor:
    single = [*(name for name, _ in before), "$A", *(name for name, _ in after)]
    return processors.TemplateProcessing(single=single, special_tokens=[*before, *after])  # type: ignore[arg-type]


PROMPT = "def größer(argument):\n"
BEGIN, END, MASK = ("<s>", 380), ("</s>", 381), ("[gMASK]", 382)
TEMPLATES = {
    "begins": (template(BEGIN), [380]),
    "after byte level": (processors.Sequence([processors.ByteLevel(), template(BEGIN)]), [380]),  # Llama 3
    "begins twice": (template(MASK, BEGIN), [382, 380]),  # GLM
    "and ends": (template(BEGIN, after=(END,)), [380]),
    "roberta": (processors.RobertaProcessing(END, BEGIN), [380]),
    "bert": (processors.BertProcessing(END, MASK), [382]),
    "only ends": (template(after=(END,)), []),
    "byte level": (processors.ByteLevel(), []),  # GPT-2
    "none": (None, []),
}


def theirs(path: Path, text: str) -> list[int]:
    """What transformers makes of a prompt with the same files, without the end that a template may add."""
    ids = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)(text).input_ids
    return ids[:-1] if ids[-1] == 381 else ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_begins_as_with_transformers(tmp_path: Path, name: str) -> None:
    processor, beginning = TEMPLATES[name]
    path = byte_level(tmp_path / "files", processor, {"bos_token": "<s>"})
    for bos in ("auto", "true", "false"):
        loaded = load_tokenizer(path, bos)
        expected = {"auto": beginning, "true": beginning or [380], "false": []}[bos]
        assert loaded.encode_prompt(PROMPT) == [*expected, *loaded.encode(PROMPT)]
        for document in loaded.encode_documents([PROMPT, "x"]):
            assert document[: len(expected) + 1].tolist() == [*expected, document[len(expected)]]
            assert document[-1] == loaded.end_of_text == 381
            assert not loaded.is_blank(document)
        assert loaded.decode_documents(loaded.encode_documents([PROMPT])) == [PROMPT]
        assert loaded.is_blank(np.array([*expected, 381]))
        # What is saved says so itself, to transformers as well.
        loaded.save(tmp_path / bos)
        again = load_tokenizer(tmp_path / bos)
        assert (again.beginning, again.bos, again.identity) == (loaded.beginning, loaded.bos, loaded.identity)
        assert theirs(tmp_path / bos, PROMPT) == loaded.encode_prompt(PROMPT)
    assert theirs(path, PROMPT) == load_tokenizer(path).encode_prompt(PROMPT)
    beginnings = {load_tokenizer(path, bos).beginning for bos in ("auto", "true", "false")}
    assert len({load_tokenizer(path, bos).identity for bos in ("auto", "true", "false")}) == len(beginnings)


def test_a_config_that_adds_bos_counts_where_no_template_does(tmp_path: Path) -> None:
    wants = {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}, "add_bos_token": True}
    loaded = load_tokenizer(byte_level(tmp_path / "wants", processors.ByteLevel(), wants))
    assert loaded.beginning == (380,)
    loaded.save(tmp_path / "saved")
    assert theirs(tmp_path / "saved", "x") == loaded.encode_prompt("x")
    unknown = {"bos_token": "<begin>", "add_bos_token": True}
    assert load_tokenizer(byte_level(tmp_path / "unknown", None, unknown)).beginning == ()
    declared = load_tokenizer(byte_level(tmp_path / "declared", None, {"bos_token": "<s>"}))
    assert (declared.beginning, declared.bos) == ((), 380)
    # A template holds against a config that denies it, as in transformers; the saved files no longer disagree.
    denied = load_tokenizer(
        byte_level(tmp_path / "denied", template(BEGIN), {"bos_token": "<s>", "add_bos_token": False})
    )
    assert denied.encode_prompt("x") == theirs(tmp_path / "denied", "x")
    assert json.loads(denied.carried["tokenizer_config.json"])["add_bos_token"] is True


def test_bos_that_no_tokenizer_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.bos must be auto or false .*; got true with data\.tokenizer=bytes\. Leave"
    ):
        load_tokenizer("bytes", "true")
    BPE.save(tmp_path / "bpe")
    with pytest.raises(ValueError, match=r"data\.bos must be auto or false .* name a tokenizer with a bos_token"):
        load_tokenizer(tmp_path / "bpe", "true")
    # Without a word on BOS, the usual name of one is taken where it is asked for, and only there.
    path = byte_level(tmp_path / "bare", None)
    assert load_tokenizer(path).beginning == ()
    assert load_tokenizer(path, "true").beginning == (380,)
    wrong = byte_level(tmp_path / "wrong", template(("<s>", 999)))
    with pytest.raises(ValueError, match=r"data\.tokenizer must begin texts with tokens that it has; .* the id 999"):
        load_tokenizer(wrong)


def test_every_file_of_a_tokenizer_goes_along(tmp_path: Path) -> None:
    path = foreign(tmp_path / "files", config={"eos_token": "</s>"})
    (path / "additional_chat_templates").mkdir()
    others = ("tokenizer.model", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool.jinja")
    for name in others:
        (path / name).write_bytes(b"\xff" + name.encode())
    (path / "model.safetensors").write_bytes(b"not the tokenizer's")
    load_tokenizer(path).save(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    files = {str(file.relative_to(tmp_path / "b")) for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert files == {"tokenizer.json", "tokenizer_config.json", *others}
    for name in others:
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()


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


@pytest.mark.parametrize("name", ["no-such/", "my/no/such", "./no-such", "no-such/tokenizer.json"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"must be a file or directory that exists; got {name}. Check the path"):
        load_tokenizer(name)


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
