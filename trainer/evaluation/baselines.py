"""What counting alone predicts of the held-out text: the models that a language model must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..data.corpus import Corpus

TOKENS_COUNTED = 20_000_000  # of training documents, a fair sample of larger corpora


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out documents under three counting models."""

    byte_unigram: float
    token_unigram: float
    token_bigram: float


def text_baselines(corpus: Corpus) -> Baselines:
    """Fits byte-unigram, token-unigram and token-bigram models on training documents and scores the held-out ones.

    The token models predict what a language model is scored on: every token but the first of each document, end of
    text included; the byte model predicts every byte, and one end of text per document. All are divided by the bytes of
    the text. Unigrams add one to every count, and do not count the BOS that begins documents. The bigram is
    interpolated with the unigram by absolute discounting (Ney et al., 1994): with n(v, w) counts, n(v) their sum, m(v)
    the number of distinct w after v, and d = n_1/(n_1 + 2 n_2) from the numbers of pairs seen once and twice,

        p(w | v) = max(n(v, w) - d, 0) / n(v) + d m(v) / n(v) p(w)
    """
    training = _documents(corpus, corpus.members["train"], TOKENS_COUNTED)
    held_out = _documents(corpus, corpus.members["validation"])
    vocabulary = corpus.tokenizer.vocabulary_size
    size = corpus.text_bytes("validation")
    bos = corpus.tokenizer.beginning[:1]
    counted = np.concatenate([ids[1:] if ids[0] in bos else ids for ids in training])
    counts = np.bincount(counted, minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    before, after = _pairs(held_out)
    bigram = _bigram(*_pairs(training), before, after, unigram)
    byte_counts = _byte_counts(corpus, training) + 1.0
    byte_bits = -_byte_counts(corpus, held_out) @ np.log2(byte_counts / byte_counts.sum())
    return Baselines(
        byte_unigram=float(byte_bits) / size,
        token_unigram=-float(np.log2(unigram[after]).sum()) / size,
        token_bigram=-float(np.log2(bigram).sum()) / size,
    )


def _documents(corpus: Corpus, members: np.ndarray, limit: float = math.inf) -> list[np.ndarray]:
    """The documents, or a choice of them by hash with about `limit` tokens."""
    tokens = corpus.cache.lengths[members].sum()
    if tokens > limit:
        order = members[np.argsort(corpus.cache.hashes[members], kind="stable")]
        members = order[: 1 + np.searchsorted(np.cumsum(corpus.cache.lengths[order]), limit)]
    return [corpus.cache[int(document)] for document in members]


def _pairs(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids of each token that has a successor in its document, and of that successor."""
    before = np.concatenate([ids[:-1] for ids in documents]).astype(np.int64)
    after = np.concatenate([ids[1:] for ids in documents]).astype(np.int64)
    return before, after


def _bigram(
    before: np.ndarray, after: np.ndarray, queried_before: np.ndarray, queried_after: np.ndarray, unigram: np.ndarray
) -> np.ndarray:
    """p(queried_after | queried_before) of the bigram fitted on (before, after)."""
    vocabulary = len(unigram)
    pairs, counts = np.unique(before * vocabulary + after, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    seen = np.bincount(before, minlength=vocabulary)[queried_before]
    distinct = np.bincount(pairs // vocabulary, minlength=vocabulary)[queried_before]
    queried = queried_before * vocabulary + queried_after
    place = np.minimum(np.searchsorted(pairs, queried), len(pairs) - 1)
    count = np.where(pairs[place] == queried, counts[place], 0)
    known = np.maximum(seen, 1)
    backed_off = np.where(seen > 0, discount * distinct / known, 1.0)
    return np.maximum(count - discount, 0) / known + backed_off * unigram[queried_after]


def _byte_counts(corpus: Corpus, documents: list[np.ndarray]) -> np.ndarray:
    """float64 `[257]`: how often each byte occurs in the text of the documents, and end of text."""
    counts = np.zeros(257)
    for first in range(0, len(documents), 64):
        text = "".join(corpus.tokenizer.decode_documents(documents[first : first + 64]))
        counts[:256] += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    counts[256] = len(documents)
    return counts
