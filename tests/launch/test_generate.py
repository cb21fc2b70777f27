"""Text that is streamed equals text that is decoded at once, and ends where it should."""

import pytest
from tokenizers.processors import TemplateProcessing

from longreach.launch.generate import prompt_ids, text_pieces, until
from longreach.trainer.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe


def test_a_prompt_begins_as_documents_do_and_has_tokens_that_the_model_has() -> None:
    own = byte_tokenizer()
    own.library.add_special_tokens(["<s>"])
    own.library.add_tokens(["<tool>"])
    own.library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer = Tokenizer(own.library, 256, {})
    assert prompt_ids(tokenizer, "größe", 258) == [257, *"größe".encode()]
    with pytest.raises(
        ValueError, match=r"prompt must .*; got id 258 \('<tool>'\) with an embedding of 258 rows\. Leave"
    ):
        prompt_ids(tokenizer, "a <tool>", 258)
    assert prompt_ids(tokenizer, "a <tool>", 259)[-1] == 258
    pieces = list(text_pieces(tokenizer, "größe", [*"!ß".encode()]))
    assert pieces == ["!", "ß"]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    return train_bpe([["def naïve(größe): return 'größe' # 漢字 and more words, words"] * 20], 300)


@pytest.mark.parametrize("text", ["größe 漢字 🙂 def f(x): return x\n", "plain words, words", "é"])
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    prompt = "def größe 漢"
    pieces = list(text_pieces(tokenizer, prompt, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 1 or len(text) == 1


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    text = "".join(text_pieces(byte_tokenizer(), "a", [ord("b"), 0xE6, 0xBC]))
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") == "b"
    assert len(text) > 1


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd", "ef"], [], "abcdef"),
        (["ab", "cd", "ef"], ["de"], "abc"),
        (["ab", "cd", "ef"], ["x", "f", "cd"], "ab"),
        (["a", "a", "a", "b"], ["aab"], "a"),
        (["ab", "c"], ["cd"], "abc"),
        (["end"], ["end"], ""),
    ],
)
def test_the_first_stop_ends_the_text(pieces: list[str], stops: list[str], expected: str) -> None:
    assert "".join(until(pieces, stops)) == expected


def test_nothing_of_a_stop_is_shown_before_it_is_certain() -> None:
    shown = until(iter(["a", "\n", "\n", "b"]), ["\n\n"])
    assert [piece for piece in shown if piece] == ["a"]
