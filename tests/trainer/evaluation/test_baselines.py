from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longreach.trainer.data.corpus import Corpus, open_corpus
from longreach.trainer.data.settings import DataSettings
from longreach.trainer.evaluation import baselines
from longreach.trainer.evaluation.baselines import text_baselines


def corpus_of(tmp_path: Path, texts: list[str]) -> Corpus:
    for i, text in enumerate(texts):
        (tmp_path / f"{i:04}.txt").write_text(text)
    settings = DataSettings("text", str(tmp_path / "*.txt"), tokenizer="bytes", validation_fraction=0.2)
    return open_corpus(settings, tmp_path / "cache", 0)


def random_texts(transition: np.ndarray, seed: int = 0) -> list[str]:
    """Documents of a Markov chain over letters, each numbered so that no two are equal."""
    generator = np.random.default_rng(seed)
    texts = []
    for i in range(60):
        letters = [0]
        for _ in range(400):
            letters.append(int(generator.choice(len(transition), p=transition[letters[-1]])))
        texts.append("".join(chr(97 + letter) for letter in letters) + f"{i}")
    return texts


def test_entropies_of_a_known_source(tmp_path: Path) -> None:
    transition = np.full((4, 4), 0.02)
    transition[range(4), [1, 2, 3, 0]] = 0.94
    entropy = -float((transition[0] * np.log2(transition[0])).sum())
    found = text_baselines(corpus_of(tmp_path, random_texts(transition)))
    # Four letters, equally frequent, and the few bytes of numbers and ends besides.
    assert found.byte_unigram == pytest.approx(2.0, abs=0.15)
    assert found.token_unigram == pytest.approx(found.byte_unigram, abs=0.02)
    assert found.token_bigram == pytest.approx(entropy, abs=0.12)


def test_scores_equal_sums_over_tokens(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [f"the {i} cat sat {'on the mat ' * (i % 5)}" for i in range(40)])
    counts = np.ones(257)
    for document in corpus.train.members:
        np.add.at(counts, corpus.cache[int(document)], 1)
    bits = [
        -np.log2(counts[token] / counts.sum())
        for document in corpus.validation.members
        for token in corpus.cache[int(document)][1:]
    ]
    assert text_baselines(corpus).token_unigram == pytest.approx(sum(bits) / corpus.text_bytes("validation"), rel=1e-12)


def test_the_bigram_is_a_distribution() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.integers(0, 8, 60), generator.integers(0, 9, 60)
    unigram = np.bincount(after, minlength=10) + 1.0
    unigram /= unigram.sum()
    for context in range(10):  # 8 and 9 were never seen
        p = baselines._bigram(before, after, np.full(10, context), np.arange(10), unigram)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1.0, rel=1e-12)


def test_large_corpora_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(tmp_path, random_texts(np.full((4, 4), 0.25)))
    whole = text_baselines(corpus)
    monkeypatch.setattr(baselines, "TOKENS_COUNTED", 4000)
    sampled = text_baselines(corpus)
    assert sampled != whole
    assert sampled.token_unigram == pytest.approx(whole.token_unigram, abs=0.1)
