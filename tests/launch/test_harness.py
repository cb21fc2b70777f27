"""The adapter of lm-evaluation-harness gives the scores and the texts of the model, in batches as one by one."""

import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import commands
import harness_stand_in
import pytest
import torch

from longreach.kernels.documents import Documents
from longreach.models.decoding import generate
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import Sequence
from longreach.trainer.data.tokenizers import byte_tokenizer

if importlib.util.find_spec("lm_eval") is None:
    harness_stand_in.install()

from longreach.launch import harness

MISSING = harness_stand_in.TemplateLM is harness.TemplateLM
LENGTH, END = 24, 256


def small():
    model = LanguageModel(
        vocabulary=257, width=16, depth=2, pattern=["softmax"], initial_std=0.5,
        mixers={"softmax": partial(SoftmaxAttention, heads=2)}, feed_forward=partial(SwiGLU, hidden=16),
    ).double()  # fmt: skip
    model.initialise(0)
    return model.eval()


@pytest.fixture
def adapter(monkeypatch):
    model = small()
    monkeypatch.setattr(harness, "locate", lambda path, setting: path)
    monkeypatch.setattr(harness, "load", lambda path, device: (model, byte_tokenizer()))
    monkeypatch.setattr(harness, "read_config", lambda path: {"data": {"sequence_length": LENGTH}})

    def make(**settings):
        return harness.LongReachLM("runs/mine", device="cpu", **settings)

    return make


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@torch.no_grad()
def scored(model, ids, given):
    """The log-probabilities of what follows the first ids, and whether each is the likeliest."""
    rows = torch.tensor([ids])
    logits = model(rows, Sequence.single(Documents.whole(*rows.shape)))[0].log_softmax(-1)[given - 1 : -1]
    following = rows[0, given:]
    value = float(logits.gather(-1, following[:, None]).sum())
    return pytest.approx(value, abs=1e-9), bool((logits.argmax(-1) == following).all())


@pytest.mark.parametrize("settings", [{}, {"batch_size": "3", "prefill_tokens": 5}], ids=str)
def test_continuations_are_scored_after_their_contexts(adapter, settings):
    lm = adapter(**settings)
    pairs = [
        ("a context", " goes on"),
        ("", "begins"),
        ("x", "y"),
        ("what is far too long for the model", " at its end"),
    ]
    rows = [[*a.encode(), *b.encode()] if a else [END, *b.encode()] for a, b in pairs]
    expected = []
    for row, (_, continuation) in zip(rows, pairs, strict=True):
        row = row[-LENGTH - 1 :]
        expected.append(scored(lm.model, row, len(row) - len(continuation)))
    assert lm.loglikelihood(requests(*pairs)) == expected
    likely = list(generate(lm.model, [*b"ab"], max_new_tokens=3, temperature=0.0))
    (_, greedy), (_, other) = lm._loglikelihood_tokens([(None, [*b"ab"], likely), (None, [*b"ab"], [*likely, END])])
    assert greedy
    assert other == (next(generate(lm.model, [*b"ab", *likely], max_new_tokens=1, temperature=0.0)) == END)


def test_a_text_is_scored_whole_each_token_once(adapter):
    lm, text = adapter(batch_size=2), "a text that is longer than the model reads at once, by far"
    ids = [END, *text.encode()]
    parts = [(0, LENGTH), (LENGTH, 2 * LENGTH), (2 * LENGTH, len(text))]
    total = sum(
        scored(lm.model, ids[max(0, stop - LENGTH) : stop + 1], start - max(0, stop - LENGTH) + 1)[0].expected
        for start, stop in parts
    )
    assert lm.loglikelihood_rolling(requests((text,), ("b",)), disable_tqdm=True) == [
        pytest.approx(total, abs=1e-9),
        scored(lm.model, [END, *b"b"], 1)[0],
    ]


def test_texts_end_before_what_ends_them(adapter):
    lm = adapter(batch_size=2)
    free = [
        lm.generate_until(requests((context, {"max_gen_toks": 12, "until": []})))[0] for context in ("abc", "q", "zz")
    ]
    stop = next(letter for letter in free[0] if letter != free[0][0])
    settings = {"max_gen_toks": 12, "until": [stop], "do_sample": False}
    found = lm.generate_until(
        requests(("abc", settings), ("q", {"max_gen_toks": 3}), ("zz", settings)), disable_tqdm=True
    )
    assert found[0] == free[0][: free[0].index(stop)]
    assert found[2] == free[2].partition(stop)[0]
    assert free[1].startswith(found[1].rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda make: make(batch_size="auto"), "batch_size must be a number of at least 1; got 'auto'"),
        (
            lambda make: make().generate_until(requests(("a", {"top_k": 3, "max_gen_toks": 2}))),
            r"gen_kwargs must be among .*; got \['top_k'\]",
        ),
        (
            lambda make: make().generate_until(requests(("a", {"max_gen_toks": LENGTH}))),
            "max_gen_toks must be less than max_length, 24; got 24",
        ),
        (
            lambda make: make().loglikelihood(requests(("a", "b" * 60))),
            "max_length must hold every continuation; got 24",
        ),
    ],
)
def test_what_cannot_be_is_refused(adapter, call, message):
    with pytest.raises(ValueError, match=message):
        call(adapter)


def test_it_is_named_by_its_checkpoint(adapter):
    assert adapter().tokenizer_name == str(Path("runs/mine"))
    assert adapter(max_length="7").max_length == 7


@pytest.mark.slow
@pytest.mark.skipif(not MISSING, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_command_says_what_to_install(tmp_path):
    done = commands.run("longreach.launch.harness", "--model", "longreach", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No module named 'lm_eval'. Install lm-evaluation-harness: pip install")
    assert done.stderr.count("\n") == 1
