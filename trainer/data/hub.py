"""The hub: a data set streamed document by document, gone on with where it failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .settings import DataSettings

WAITS_S = (1, 2, 4, 8, 16, 32, 60)  # before each new try at one document
STATE_EVERY = 1000  # documents after which the place in the stream is noted

log = logging.getLogger("longreach")


@dataclass(frozen=True)
class HubDataset:
    """The documents that `identity` names; each is read once, however often the stream breaks."""

    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: DataSettings) -> HubDataset:
        """Raises ValueError where settings are missing or impossible."""
        if not settings.name:
            raise ValueError("data.name must be given with data=hub; got nothing. Name a data set as owner/name")
        if settings.max_documents is not None and settings.max_documents < 1:
            raise ValueError(f"data.max_documents must be at least 1; got {settings.max_documents}. Raise or remove it")
        return cls(
            {
                "source": "hub",
                "name": settings.name,
                "subset": settings.subset,
                "split": settings.split or "train",
                "column": settings.column or "text",
                "max_documents": settings.max_documents,
            }
        )

    @property
    def name(self) -> str:
        return self.identity["name"]

    def read_from(self, first: int) -> Iterator[str]:
        """The documents from number `first` on.

        Raises ValueError for a data set that is not there, a column that is not, and a stream that keeps breaking.
        """
        column, most = self.identity["column"], self.identity["max_documents"]
        for example in islice(self._examples(first), None if most is None else max(most - first, 0)):
            if column not in example:
                raise ValueError(
                    f"data.column must be a field of {self.name}; got {column!r}. It has {', '.join(example)}"
                )
            text = example[column]
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"data.column must be a field of text; got {column!r}, which is {kind}. Change it")
            yield text or ""

    def _examples(self, first: int) -> Iterator[dict[str, Any]]:
        number, failures = first, 0
        noted, state = 0, None  # a place in the stream, from which it need not be read from its beginning
        while True:
            try:
                stream = self._open()
                if state is not None:
                    stream.load_state_dict(state)
                for example in islice(stream, number - noted, None):
                    yield example
                    number, failures = number + 1, 0
                    if number % STATE_EVERY == 0 and hasattr(stream, "state_dict"):
                        noted, state = number, stream.state_dict()
                return
            except Exception as error:  # the hub's client raises errors of many kinds
                # Where nothing could be read, a name or the network is wrong, and waiting would only hide it.
                if number == 0 or failures == len(WAITS_S):
                    raise self._refusal(number, error) from error
                wait = WAITS_S[failures]
                failures += 1
                log.warning(
                    "data.name: %s failed at document %d (%s: %s); going on from there in %d s",
                    *(self.name, number, type(error).__name__, error, wait),
                )
                time.sleep(wait)

    def _open(self) -> Any:
        import datasets  # a second to import, which only this source has to spend

        name, subset, split = (self.identity[key] for key in ("name", "subset", "split"))
        return datasets.load_dataset(name, subset, split=split, streaming=True)

    def _refusal(self, number: int, error: Exception) -> ValueError:
        place = f", at document {number}" if number else ""
        kept = f"; the {number} documents before it are kept, and the same command goes on from there" if number else ""
        return ValueError(
            f"data.name must be a data set that can be read from the hub or its cache; got {self.name} "
            f"(subset {self.identity['subset']}, split {self.identity['split']}){place}: {type(error).__name__}: "
            f"{error}. Check the name, the network and HF_HUB_OFFLINE{kept}"
        )
