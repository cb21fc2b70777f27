"""A long text encoded in pieces has the ids of the whole, whichever tokenizer it is."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from covering import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from longreach.trainer.data.pieces import PieceEncoder, cut_for_training
from longreach.trainer.data.tokenizers import train_bpe

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}]+"
WORDS = ["the", "they're", "größer", "世界", "aaaa", "123456", "don't", "🙂", "é", "x", "naïve", "ﬁ", "HELLO", "한국"]
ENDS = [" ", "  ", "\n", "\n\n", "\t", ".", ", ", "", "'s ", "\r\n", "\u3000", "\u0301", "_", "-", "<mask>", "    "]


def corpus(seed: int = 0, words: int = 3000) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(ENDS) for _ in range(words))


def learnt(
    model: models.Model, trainer: trainers.Trainer, pre_tokenizer: object, normalizer: object = None
) -> Tokenizer:
    library = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer  # type: ignore[assignment]
    if normalizer is not None:
        library.normalizer = normalizer  # type: ignore[assignment]
    library.train_from_iterator([corpus(i, 60) for i in range(40)], trainer)
    library.encode_special_tokens = True
    return library


def bpe(pre_tokenizer: object, normalizer: object = None, **model: object) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(pre_tokenizer) else []
    options = {name: model[name] for name in ("end_of_word_suffix",) if name in model}
    special = [model["unk_token"]] if "unk_token" in model else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False, **options
    )
    return learnt(models.BPE(**model), trainer, pre_tokenizer, normalizer)


def byte_level(pattern: str) -> object:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_added_tokens() -> Tokenizer:
    library = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))
    library.add_tokens([AddedToken("<mask>", lstrip=True), AddedToken("    "), AddedToken("x", single_word=True)])
    return library


def llama_2() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe(None, normalizer, unk_token="<unk>", fuse_unk=True)


def unigram(pre_tokenizer: object) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    normalizer = normalizers.Sequence([normalizers.NFKC(), spaces, normalizers.Strip()])
    return learnt(models.Unigram(), trainer, pre_tokenizer, normalizer)


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    return learnt(
        models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    )


def word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["[UNK]"], show_progress=False)
    return learnt(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), normalizers.Lowercase())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2 with a space before": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": lambda: bpe(byte_level(LLAMA_3), ignore_merges=True),
    "Qwen": lambda: bpe(byte_level(LLAMA_3), normalizers.NFC()),
    "numbers from the right": lambda: bpe(byte_level(FROM_THE_RIGHT)),
    "bytes without words": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "Llama 2": llama_2,
    "Gemma": lambda: bpe(None, normalizers.Replace(" ", "▁"), unk_token="<unk>"),
    "Metaspace": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), unk_token="<unk>"),
    "Metaspace, first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), unk_token="<unk>"),
    "CLIP": lambda: bpe(pre_tokenizers.Whitespace(), normalizers.Lowercase(), end_of_word_suffix="</w>", unk_token="u"),
    "added tokens": with_added_tokens,
    "T5": lambda: unigram(pre_tokenizers.Metaspace()),
    "Unigram without words": lambda: unigram(None),
    "BERT": word_piece,
    "words": word_level,
    "every five characters": lambda: bpe(pre_tokenizers.FixedLength(5)),
    "digits": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Punctuation()])),
    "scripts": lambda: bpe(pre_tokenizers.UnicodeScripts()),
}
OFTEN = ("GPT-2", "Llama 3", "Llama 2", "T5", "BERT")  # each another way to find words
MADE: dict[str, Tokenizer] = {}


def made(kind: str) -> Tokenizer:
    if kind not in MADE:
        MADE[kind] = KINDS[kind]()
    return MADE[kind]


def parts() -> st.SearchStrategy[str]:
    """Words, runs of one character, and whatever Unicode has."""
    repeated = [" ", "a", "1", "\n", ".", "é", "世", "\u0301", "ab", "12", " a", "A"]
    run = st.tuples(st.sampled_from(repeated), st.integers(1, 90))
    words = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(ENDS)).map("".join), max_size=40).map("".join)
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    return st.lists(st.one_of(words, run.map(lambda r: r[0] * r[1]), anything), max_size=12).map("".join)


@pytest.mark.parametrize("kind", slow_but(OFTEN, {kind: kind for kind in KINDS}))
@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(text=parts())
def test_ids_in_pieces_are_those_of_the_whole(kind: str, text: str) -> None:
    library = made(kind)
    whole = library.encode(text, add_special_tokens=False).ids
    assert PieceEncoder(library, piece=64, window=16).encode(text).tolist() == whole


UNCUT = {"Unigram without words", "every five characters"}  # these look at the whole text, and get it


@pytest.mark.parametrize("kind", slow_but(OFTEN, {kind: kind for kind in KINDS}))
def test_no_piece_is_long_whatever_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, lengths = made(kind), []
    encoder = PieceEncoder(library, piece=1024, window=128)
    ids = encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda *texts: (lengths.extend(map(len, texts)), ids(*texts))[1])
    draw = random.Random(1)
    letters = "".join(draw.choice("theyrgößaxé") for _ in range(9000))  # one word
    chinese = "".join(draw.choice("世界。的，") for _ in range(9000))
    for text in (corpus(7, 3000), chinese, letters):
        lengths.clear()
        assert encoder.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
        # Where tokens are chosen by the whole word, one that is long is not cut.
        one_word = (text is letters and kind in ("BERT", "words", "CLIP", "T5")) or (text is chinese and kind == "T5")
        assert kind in UNCUT or one_word or max(lengths) <= 2 * 1024


def test_a_run_of_digits_counted_in_threes() -> None:
    library = made("Llama 3")
    for size in range(400, 410):
        text = "the " * 40 + "1" * size + "12" * 300 + " they're"
        assert PieceEncoder(library, piece=64, window=16).encode(text).tolist() == library.encode(text).ids


def test_long_documents_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.trainer.data.tokenizers.CHARACTERS_AT_ONCE", 20_000)
    tokenizer = train_bpe([[corpus(i, 60)] for i in range(40)], 400)
    tokenizer._pieces = PieceEncoder(tokenizer.library, piece=8192)
    long = corpus(3, 20_000)
    first, second, third = tokenizer.encode_documents(["x", long, "the"])
    assert second.tolist() == [*tokenizer.encode(long), tokenizer.end_of_text]
    assert [first.tolist(), third.tolist()] == [[*tokenizer.encode(text), 0] for text in ("x", "the")]


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(text=parts())
def test_merges_are_learnt_from_the_words_of_the_whole(text: str) -> None:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = f"{corpus(1, 30)} {text} {corpus(2, 30)}"
    cut = cut_for_training(text, splitter, piece=128, window=16)
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 192
    whole = [word for word, _ in splitter.pre_tokenize_str(text)]
    if max(map(len, whole)) < 32:
        assert [word for piece in cut for word, _ in splitter.pre_tokenize_str(piece)] == whole


MEMORY = """
import re, sys
from longreach.trainer.data.corpus import open_corpus
from longreach.trainer.data.settings import DataSettings

def peak():
    # Not getrusage's peak, in which a child begins with its parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
corpus = open_corpus(DataSettings("text", sys.argv[1], tokenizer="bpe", cache_dir=sys.argv[2]))
print(len(corpus.cache), peak() - before)
"""


@pytest.mark.slow
def test_one_long_document_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(corpus(5, 1_500_000))
    size = (tmp_path / "book.txt").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "book.txt"), str(tmp_path / "cache")]
    documents, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert documents == "2"  # what is held out is cut from its end
    assert size > 8e6
    assert int(peak) < 500_000  # in kB, beyond what imports take; 200 bytes for each of the text's would be 1.6 GB
