"""Text to token ids and back: bytes, a byte-level BPE trained on the data, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
)
TOKENIZER_FILE = "tokenizer.json"
CARRIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer of the `tokenizers` library as pretraining needs it.

    Text is always text: the name of a special token written in a document is encoded as its characters. Nothing is
    added, truncated or padded, but `end_of_text` ends each document of `encode_documents`. Ids are smaller than
    `vocabulary_size`. `carried` are files that go along when it is saved.
    """

    def __init__(self, library: tokenizers.Tokenizer, end_of_text: int, carried: dict[str, str]) -> None:
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        self.library = library
        self.end_of_text = end_of_text
        self.carried = carried
        self.vocabulary_size = 1 + max(library.get_vocab(with_added_tokens=True).values())
        # Looking up each byte is what bytes need; the library's merging would take seconds a megabyte for nothing.
        self._is_bytes = self.vocabulary_size == 257 and library.to_str() == _bytes_library().to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end of text."""
        return self.library.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 ids of each text, each ended by `end_of_text`."""
        if self._is_bytes:
            parts: list[Sequence[int] | np.ndarray] = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            parts = [e.ids for e in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [np.append(np.asarray(ids, np.int64), self.end_of_text) for ids in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """`decode` of each document, faster."""
        return self.library.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)

    @property
    def identity(self) -> str:
        """A hash of what decides the ids."""
        text = json.dumps([self.library.to_str(), self.end_of_text])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the files that belong to it; `load_tokenizer(directory)` reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.library.save(str(directory / TOKENIZER_FILE))
        for name, text in self.carried.items():
            (directory / name).write_text(text, encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """Id = byte; 256 ends a text."""
    return Tokenizer(_bytes_library(), 256, _own_files())


def train_bpe(batches: Iterable[list[str]], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary_size` tokens (Sennrich et al., 2016, arXiv 1508.07909; bytes: GPT-2).

    Merges depend on the texts alone. Id 0 ends a text. Raises ValueError if the vocabulary cannot hold the bytes.
    """
    check_vocabulary_size(vocabulary_size)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=list(_byte_characters()),
        show_progress=False,
    )
    library.train_from_iterator(batches, trainer)
    return Tokenizer(library, 0, _own_files())


def check_vocabulary_size(size: int) -> None:
    if size < 257:
        raise ValueError(f"data.vocabulary_size must be at least 257 (bytes and end of text); got {size}. Raise it")


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a saved directory, a tokenizer.json, or a Hugging Face name; "bytes" is the byte tokenizer.

    Raises ValueError where nothing loads or no end-of-text token is known.
    """
    if str(name) == "bytes":
        return byte_tokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        file = path / TOKENIZER_FILE
    elif path.is_file():
        file = path
    elif path.is_absolute() or str(name).startswith((".", "~")) or path.suffix == ".json":
        raise ValueError(f"data.tokenizer must be a file or directory that exists; got {name}. Check the path")
    else:
        file = _download(str(name)) / TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer must have a {TOKENIZER_FILE}; got {name}, which has none. Convert it to a fast tokenizer"
        )
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        message = f"data.tokenizer must be a file of the tokenizers library; got {file}: {error}. Name another"
        raise ValueError(message) from None
    # Files beside a file of some other name need not belong to it.
    beside = [file.parent / name for name in CARRIED_FILES] if file.name == TOKENIZER_FILE else []
    carried = {found.name: found.read_text(encoding="utf-8") for found in beside if found.is_file()}
    return Tokenizer(library, _find_end_of_text(library, carried, str(name)), carried)


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises ValueError where there is none, as with data=recall."""
    folder = path / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be of a model of text; got {path}, which has no tokenizer. Name another")
    return load_tokenizer(folder)


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[TOKENIZER_FILE, *CARRIED_FILES]))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ValueError(
            f"data.tokenizer must be bytes, bpe, or the path or name of a Hugging Face tokenizer; got {name!r}: "
            f"{type(error).__name__}: {error}. Check the name, the network and HF_HUB_OFFLINE"
        ) from None


def _find_end_of_text(library: tokenizers.Tokenizer, carried: dict[str, str], name: str) -> int:
    declared = [json.loads(carried[file]).get("eos_token") for file in CARRIED_FILES[:2] if file in carried]
    names = [token["content"] if isinstance(token, dict) else token for token in declared if token]
    for token in [*names, *USUAL_ENDS]:
        found = library.token_to_id(token)
        if found is not None:
            return found
    raise ValueError(
        f"data.tokenizer must have an end-of-text token; got {name}, which has neither an eos_token in "
        f"tokenizer_config.json nor one of {', '.join(USUAL_ENDS)}. Add eos_token to its tokenizer_config.json"
    )


def _own_files() -> dict[str, str]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    return {"tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def _byte_characters() -> str:
    """The printable character that stands for each byte in byte-level vocabularies, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return "".join(table[byte] for byte in range(256))


def _bytes_library() -> tokenizers.Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])
    return library
