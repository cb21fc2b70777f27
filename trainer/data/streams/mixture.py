"""Mixture: which source each row comes from, by exact weights, from the row's number alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from ..packing import Part, Row, RowStream, TokenStream
from .epochs import Piece
from .plan import Reading

LONGEST = 100_000  # rows after which a mixture repeats itself


class Shares:
    """Source s gets its exact weight of the rows: after any number of rows less than one more or fewer.

    The chairman assignment of Tijdeman (1980, Discrete Mathematics 32): of the K sources whose next row may already
    come, which are those with n·w_s − c_s(n − 1) ≥ 1/(2K − 2), row n goes to the one whose must come first. The counts
    are exact again after as many rows as the weights' common denominator, and from there it repeats itself.
    Raises ValueError for weights that are not positive, or whose denominator is larger than LONGEST.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        for name, weight in exact.items():
            if weight <= 0:
                raise ValueError(
                    f"data.mixture.{name}.weight must be more than 0; got {weights[name]}. Leave the source out instead"
                )
        scale = lcm(*(weight.denominator for weight in exact.values()))
        parts = [int(weight * scale) for weight in exact.values()]
        self.parts = [part // gcd(*parts) for part in parts]
        self.period = sum(self.parts)
        if self.period > LONGEST:
            given = ", ".join(f"{name}={weight}" for name, weight in weights.items())
            raise ValueError(
                f"data.mixture weights must be exact parts of {LONGEST} rows at most; got {given}, whose common "
                "denominator is larger. Round them to fewer digits, with a round sum"
            )
        self._sources = self._assigned()
        self._places = [np.flatnonzero(self._sources == source) for source in range(len(self.parts))]

    def _assigned(self) -> np.ndarray:
        # In whole numbers: everything is times period·(2K − 2).
        sources, period = range(len(self.parts)), self.period
        spread = max(1, 2 * len(self.parts) - 2)
        counts = [0 for _ in sources]
        assigned = np.empty(period, np.int64)
        for row in range(period):
            best, least, weight = -1, 0, 1
            for source in sources:
                lag = ((row + 1) * self.parts[source] - counts[source] * period) * spread
                if lag >= period:
                    until = period * (spread - 1) - lag  # until it must come, times its weight
                    if best < 0 or until * weight < least * self.parts[source]:
                        best, least, weight = source, until, self.parts[source]
            counts[best] += 1
            assigned[row] = best
        return assigned

    def source(self, row: int) -> int:
        """The number of the source that a row comes from."""
        return int(self._sources[row % self.period])

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows come from a source."""
        whole, part = divmod(rows, self.period)
        return whole * self.parts[source] + int(np.searchsorted(self._places[source], part))


class MixtureStream(RowStream):
    """Rows of several sources, by exact weights: each row is of one source, and is that source's next.

    sources: streams of one length, packing and seed, by name. Its order of the names is theirs, whatever order they are
    given in.
    """

    version = TokenStream.version

    def __init__(self, sources: Mapping[str, TokenStream], weights: Mapping[str, float]) -> None:
        self.names = tuple(sorted(sources))
        self.sources = [sources[name] for name in self.names]
        self.shares = Shares({name: weights[name] for name in self.names})
        self._refuse_twice()
        made_of = [[stream.fingerprint, part] for stream, part in zip(self.sources, self.shares.parts, strict=True)]
        fingerprint = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()
        first = self.sources[0]
        super().__init__(first.length, fingerprint, first.seed, first.packing)
        self.tokens = sum(stream.tokens for stream in self.sources)
        self.begin()

    def _refuse_twice(self) -> None:
        seen: dict[str, str] = {}
        for name, stream in zip(self.names, self.sources, strict=True):
            other = seen.setdefault(stream.fingerprint, name)
            if other != name:
                raise ValueError(
                    f"data.mixture sources must differ; got {other} and {name}, which hold the same documents. Leave "
                    "one of them out"
                )

    def _begin(self) -> None:
        for number, stream in enumerate(self.sources):
            stream.read = self.read
            stream.mark = None if self.mark is None else self.shares.count(number, self.mark)
            stream._begin()

    def _readings(self, row: int) -> dict[str, Reading]:
        return {
            stream.fingerprint: Reading(self.length, self.packing, stream.mark, self.shares.count(number, row))
            for number, stream in enumerate(self.sources)
        }

    @property
    def rows(self) -> int | None:
        return None

    def source(self, number: int) -> int:
        return self.shares.source(number)

    def row(self, number: int) -> Row:
        if number < 0:
            raise ValueError(f"the row must not be negative; got {number}. Count rows from 0")
        source = self.source(number)
        return self.sources[source].row(self.shares.count(source, number))

    def pieces(self, number: int) -> list[Piece]:
        """What row `number` holds of the documents of its source."""
        source = self.source(number)
        return self.sources[source].pieces(self.shares.count(source, number))

    def parts(self, row: int) -> list[Part]:
        counts = (self.shares.count(number, row) for number in range(len(self.sources)))
        return [part for stream, rows in zip(self.sources, counts, strict=True) for part in stream.parts(rows)]
