"""Text that is streamed equals text that is decoded at once, and ends where it should."""

import pytest

from longreach.launch.generate import text_pieces, until
from longreach.trainer.tokenizers import Tokenizer, byte_tokenizer, train_bpe


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
