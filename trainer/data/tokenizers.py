"""Text to token ids and back: bytes, a byte-level BPE trained on the data, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ...models.hf import TOKENIZER_FILES
from .pieces import AT_ONCE, PIECE, PieceEncoder, cut_for_training

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
USUAL_BEGINNINGS = (
    "<s>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "<｜begin▁of▁sentence｜>",
)
SMALLEST_VOCABULARY = 257  # the bytes and end of text
BOS = ("auto", "true", "false")
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
DECLARING_FILES = (CONFIG_FILE, "special_tokens_map.json")
CARRIED_FILES = tuple(name for name in TOKENIZER_FILES if name != TOKENIZER_FILE)
# What is encoded in parallel: the library is half as fast where thousands of results wait for their end.
TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 128, AT_ONCE * PIECE


class Tokenizer:
    """A tokenizer of the `tokenizers` library as pretraining needs it.

    Text is always text: the name of a special token written in a document is encoded as its characters. Nothing is
    truncated or padded. `beginning`, the ids that the library's own template puts before a text (BOS, mostly), begins
    each document and each prompt; `end_of_text` ends each document. `bos` is that BOS, or the one that it declares
    and does not add. Ids are smaller than `vocabulary_size`. `carried` are files that go along when it is saved.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, end_of_text: int, carried: dict[str, bytes], bos: int | None = None
    ) -> None:
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        self.library = library
        self.end_of_text = end_of_text
        self.carried = carried
        self.beginning = tuple(_template(library)[0])
        self.bos = self.beginning[0] if len(self.beginning) == 1 or (self.beginning and bos is None) else bos
        self.vocabulary_size = 1 + max(library.get_vocab(with_added_tokens=True).values())
        # Bytes need no more than a look-up; the library's merging would take seconds per megabyte.
        self._is_bytes = self.vocabulary_size == 257 and library.to_str() == _bytes_library().to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without beginning and end of text."""
        return self.library.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: as a document begins."""
        return [*self.beginning, *self.encode(text)]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text in `id_type`, each begun by `beginning` and ended by `end_of_text`."""
        begin, end = np.array(self.beginning, self.id_type), np.array([self.end_of_text], self.id_type)
        return [np.concatenate([begin, ids, end]) for ids in self._ids(texts)]

    def is_blank(self, document: np.ndarray) -> bool:
        """Whether the ids of a document are only its beginning and its end."""
        return len(document) <= 1 + len(self.beginning) and tuple(document[:-1].tolist()) in ((), self.beginning)

    def _ids(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """The ids of each text: short texts many at once, long ones in pieces."""
        if self._is_bytes:
            yield from (np.frombuffer(text.encode(), np.uint8) for text in texts)
            return
        for group in _groups(texts):
            if len(group[0]) > CHARACTERS_AT_ONCE:
                yield self._pieces.encode(group[0], self.id_type)
            else:
                encoded = self.library.encode_batch_fast(group, add_special_tokens=False)
                yield from (np.array(encoding.ids, self.id_type) for encoding in encoded)

    @property
    def id_type(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that ids are stored in."""
        return np.uint16 if self.vocabulary_size <= 2**16 else np.uint32

    @cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self.library)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """`decode` of each document, faster."""
        return self.library.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)

    def ids(self) -> set[int]:
        """The ids that have a token: there may be fewer than `vocabulary_size`."""
        return set(self.library.get_vocab(with_added_tokens=True).values())

    def describe(self, token: int) -> str:
        """An id and its token, for messages."""
        return f"id {token} ({self.library.id_to_token(token)!r})"

    @property
    def identity(self) -> str:
        """A hash of what decides the ids."""
        text = json.dumps([self.library.to_str(), self.end_of_text, *self.beginning])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the files that belong to it; `load_tokenizer(directory)` reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.library.save(str(directory / TOKENIZER_FILE))
        for name, content in self.carried.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)


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
    splitter = library.pre_tokenizer
    assert splitter is not None

    def pieces() -> Iterator[list[str]]:
        for texts in batches:
            yield from _groups([piece for text in texts for piece in cut_for_training(text, splitter)])

    library.train_from_iterator(pieces(), trainer)
    return Tokenizer(library, 0, _own_files())


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, as many together as are encoded at once; one of more than CHARACTERS_AT_ONCE is alone."""
    group: list[str] = []
    characters = 0
    for text in texts:
        if group and (len(group) == TEXTS_AT_ONCE or characters + len(text) > CHARACTERS_AT_ONCE):
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def check_vocabulary_size(size: int) -> None:
    if size < SMALLEST_VOCABULARY:
        least = f"{SMALLEST_VOCABULARY} (bytes and end of text)"
        raise ValueError(f"data.vocabulary_size must be at least {least}; got {size}. Raise it")


def load_tokenizer(name: str | Path, bos: str = "auto") -> Tokenizer:
    """The tokenizer of a saved directory, a tokenizer.json, or a Hugging Face name; "bytes" is the byte tokenizer.

    bos: "auto" begins texts as its own template does; "true" with its BOS token, whatever the template; "false" with
    nothing. What is saved then has a template that says so. Raises ValueError where nothing loads, no end-of-text token
    is known, or with "true" no BOS token.
    """
    if str(name) == "bytes":
        refuse_bos(bos, "bytes")
        return byte_tokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        file = path / TOKENIZER_FILE
    elif path.is_file():
        file = path
    elif path.is_absolute() or _only_a_path(str(name)):
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
    carried = _carried(file.parent) if file.name == TOKENIZER_FILE else {}
    end_of_text = _find_end_of_text(library, carried, str(name))
    return Tokenizer(library, end_of_text, carried, _begin(library, carried, bos, str(name)))


def refuse_bos(bos: str, name: str) -> None:
    """Raises ValueError where `data.bos` asks for a token that the tokenizer `name` has not."""
    if bos == "true":
        raise ValueError(
            "data.bos must be auto or false with a tokenizer that has no BOS token; got true with "
            f"data.tokenizer={name}. Leave data.bos out, or name a tokenizer with a bos_token in its {CONFIG_FILE}"
        )


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises ValueError where there is none, as with data=recall."""
    folder = path / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be of a model of text; got {path}, which has no tokenizer. Name another")
    return load_tokenizer(folder)


def _only_a_path(name: str) -> bool:
    """Whether a name is none of the hub's, which are NAME or OWNER/NAME."""
    return name.startswith((".", "~")) or name.endswith(("/", ".json")) or name.count("/") > 1


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        patterns = [pattern for file in TOKENIZER_FILES for pattern in (file, f"{file}/*")]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ValueError(
            f"data.tokenizer must be bytes, bpe, or the path or name of a Hugging Face tokenizer; got {name!r}: "
            f"{type(error).__name__}: {error}. Check the name, the network and HF_HUB_OFFLINE"
        ) from None


def _find_end_of_text(library: tokenizers.Tokenizer, carried: dict[str, bytes], name: str) -> int:
    token = _find(library, [*_declared(carried, "eos_token"), *USUAL_ENDS])
    if token is not None:
        return token
    raise ValueError(
        f"data.tokenizer must have an end-of-text token; got {name}, which has neither an eos_token in "
        f"tokenizer_config.json nor one of {', '.join(USUAL_ENDS)}. Add eos_token to its tokenizer_config.json"
    )


def _carried(folder: Path) -> dict[str, bytes]:
    """The files in `folder`, and in its subfolders of that kind, that belong to its tokenizer.json."""
    places = [place for name in CARRIED_FILES for place in (folder / name, *sorted((folder / name).glob("*")))]
    return {str(place.relative_to(folder)): place.read_bytes() for place in places if place.is_file()}


def _declared(carried: dict[str, bytes], token: str) -> list[str]:
    """What the files beside tokenizer.json name as "eos_token" or "bos_token"."""
    declared = [json.loads(carried[file]).get(token) for file in DECLARING_FILES if file in carried]
    return [value["content"] if isinstance(value, dict) else value for value in declared if value]


def _find(library: tokenizers.Tokenizer, tokens: list[str]) -> int | None:
    return next((token_id for token in tokens if (token_id := library.token_to_id(token)) is not None), None)


def _begin(library: tokenizers.Tokenizer, carried: dict[str, bytes], bos: str, name: str) -> int | None:
    """Makes the library's template, and what `carried` says of it, begin texts as asked; returns the BOS token.

    A tokenizer_config.json that wants BOS (`add_bos_token`) gets it where the template adds nothing; where it has a
    template of its own, that one holds, as in transformers.
    """
    declared = _find(library, _declared(carried, "bos_token"))
    config = json.loads(carried.get(CONFIG_FILE, b"{}"))
    begins = bool(_template(library)[0])
    wanted = {"auto": begins or (declared is not None and config.get("add_bos_token") is True)}.get(bos, bos == "true")
    if wanted and not begins:
        bos_id = declared if declared is not None else _find(library, list(USUAL_BEGINNINGS))
        if bos_id is None:
            refuse_bos(bos, name)
        else:
            declared = bos_id
            _set_template(library, [bos_id])
    elif begins and not wanted:
        _set_template(library, [])
    # Whatever else reads the files shall begin texts alike, and BOS is never shown as a part of the text.
    if CONFIG_FILE in carried and config.get("add_bos_token", begins) != wanted:
        carried[CONFIG_FILE] = (json.dumps({**config, "add_bos_token": wanted}, indent=2) + "\n").encode()
    names = [_name(library, token, name) for token in _template(library)[0]]
    library.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in names])
    return declared


def _template(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the library's post-processor puts before and after a text."""
    if library.post_processor is None:
        return [], []
    probe = tokenizers.Tokenizer(models.WordLevel({"text": 0}, "text"))
    probe.post_processor = library.post_processor
    encoded = probe.encode("text")
    place = encoded.sequence_ids.index(0)
    return encoded.ids[:place], encoded.ids[place + 1 :]


def _set_template(library: tokenizers.Tokenizer, beginning: list[int]) -> None:
    """Lets texts begin so, and end as they did."""
    ending = _template(library)[1]
    before, after = ([library.id_to_token(token) for token in ids] for ids in (beginning, ending))
    single, second = [*before, "$A", *after], [f"{token}:1" for token in [*before, "$B", *after]]
    special = list(zip([*before, *after], [*beginning, *ending], strict=True))
    library.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=special
    )


def _name(library: tokenizers.Tokenizer, token: int, name: str) -> str:
    text = library.id_to_token(token)
    if text is None:
        raise ValueError(
            f"data.tokenizer must begin texts with tokens that it has; got {name}, whose post_processor adds the id "
            f"{token} of none. Correct its {TOKENIZER_FILE}, or name another tokenizer"
        )
    return text


def _own_files() -> dict[str, bytes]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}


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
