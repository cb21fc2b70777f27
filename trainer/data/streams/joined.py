"""Joined: the documents of several token caches under one count."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from ..token_cache import TokenCache


class JoinedDocuments:
    """The documents of caches of one tokenizer, one cache after another, as a `TokenCache` has them.

    firsts: the number of each cache's first document.
    """

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        self._caches = caches
        self.firsts = [0, *np.cumsum([len(cache) for cache in caches]).tolist()][:-1]
        self.largest_id = max(cache.largest_id for cache in caches)
        self.lengths = np.concatenate([cache.lengths for cache in caches])
        self.bytes = np.concatenate([cache.bytes for cache in caches])
        self.hashes = np.concatenate([cache.hashes for cache in caches])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        part = bisect_right(self.firsts, document) - 1
        return self._caches[part][document - self.firsts[part]]
