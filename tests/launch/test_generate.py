"""Text that is streamed equals text that is decoded at once, and ends where it should."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from longreach.launch import generate as launch
from longreach.launch.generate import prompt_ids, text_pieces, until
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
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


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint of a small model of bytes, that is only a name."""
    model = LanguageModel(
        vocabulary=257, width=16, depth=1, pattern=["softmax"], initial_std=0.5,
        mixers={"softmax": partial(SoftmaxAttention, heads=2)}, feed_forward=partial(SwiGLU, hidden=16),
    ).double()  # fmt: skip
    model.initialise(0)
    monkeypatch.setattr(launch, "locate", lambda path, setting: path)
    monkeypatch.setattr(launch, "load", lambda path, device: (model, byte_tokenizer()))
    return "runs/mine"


@pytest.mark.parametrize("more", [{}, {"temperature": 2.0, "max_length": 7}, {"stop": ["e", "\x00"]}], ids=str)
def test_several_prompts_give_what_each_gives_alone(
    checkpoint: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {"checkpoint": checkpoint, "device": "cpu", "max_new_tokens": 9, "temperature": 0.0, **more}
    texts = ["abc", "q", "größe"[:3]]
    for row, text in enumerate(texts):
        launch.generate(launch.GenerationSettings(prompt=text, seed=row, **settings))
    alone = capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    settings["prompts"] = str(tmp_path / "prompts.txt")
    for batch_size, prefill_tokens in ((2, None), (8, 2)):
        launch.generate(launch.GenerationSettings(batch_size=batch_size, prefill_tokens=prefill_tokens, **settings))
        assert capsys.readouterr().out == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prompt must be a text"),
        ({"prompt": "a", "prompts": "there.txt"}, "prompt must be left out where prompts names a file"),
        ({"prompts": "there.txt"}, "prompts must name a file with a prompt in every line; got there.txt"),
        ({"prompt": "abc", "max_length": 3}, "max_length must exceed every prompt; got 3 for one of 3 tokens"),
        ({"prompt": "abc", "batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_wrong_prompts_are_refused(checkpoint: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.generate(launch.GenerationSettings(checkpoint=checkpoint, device="cpu", **settings))
