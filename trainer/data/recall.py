"""Multi-query associative recall (MQAR; Arora et al., 2023, "Zoology", arXiv 2312.04927): problems drawn when read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from .packing import NO_TARGET, Row, RowStream
from .settings import DataSettings
from .sources import refuse_ignored

FORMAT = 1  # raised when the same settings give other problems
DEFAULT_VOCABULARY = 8192
FILLERS = ("blank", "random")
BLANK = 0
SPLITS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class RecallTask:
    """Problems of `length` tokens below `vocabulary`; number n of a split is drawn from (seed, split, n) alone.

    The first S tokens hold the pairs: k_1 v_1 … k_P v_P, S = 2P; or, with `spread`, S = `spread` tokens of filler in
    which pairs stand at places of two tokens, anywhere alike. The keys are distinct ones of 1 .. V/2 − 1, the values
    distinct ones of V/2 .. V − 1. The M = ⌊(length − S) / 2⌋ places of two tokens behind them hold `queries` keys that
    come again, each before its value. Query places are drawn one after another without repetition, place i = 1 .. M
    with a probability in proportion to i^(power − 1): the power law of the paper, anywhere alike for power 1. Keys are
    asked for in an order of their own, and none a second time before all were asked for. A queried key's only successor
    is its value: that is its target, and there are no other targets. The rest is filler: token 0 ("blank"), or "random"
    ones of 1 .. V − 1 that are no key of the problem.
    """

    length: int
    pairs: int
    queries: int
    vocabulary: int
    power: float = 0.01
    filler: str = "blank"
    seed: int = 0
    spread: int | None = None

    @property
    def before_queries(self) -> int:
        """S: tokens from the beginning that hold the pairs."""
        return 2 * self.pairs if self.spread is None else self.spread

    @property
    def values(self) -> int:
        """How many tokens are values."""
        return self.vocabulary - self.vocabulary // 2

    def problem(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, int64 `[length]`; −100 where there is no target. `split` is "train" or "validation"."""
        key = np.array([self.seed, SPLITS[split]], np.uint64)
        # Raw bits: numpy promises that these stay the same, not that what it makes of them does.
        draw = np.random.Philox(key=key, counter=np.array([0, number, 0, 0], np.uint64)).random_raw
        half, start = self.vocabulary // 2, self.before_queries
        keys = 1 + _permutation(draw(half - 1))
        keys, others = keys[: self.pairs], keys[self.pairs :]
        values = half + _permutation(draw(self.values))[: self.pairs]
        places = self._places(draw((self.length - start) // 2))
        rounds = -(-self.queries // self.pairs)
        asked = np.concatenate([_permutation(draw(self.pairs)) for _ in range(rounds)])[: self.queries]
        if self.spread is None:
            at, filled = np.arange(self.pairs), start
        else:
            at, filled = _permutation(draw(start // 2))[: self.pairs], 0
        tokens = np.full(self.length, BLANK, np.int64)
        if self.filler == "random":
            pool = np.concatenate([others, np.arange(half, self.vocabulary)])
            tokens[filled:] = pool[draw(self.length - filled) % np.uint64(len(pool))]
        tokens[2 * at], tokens[2 * at + 1] = keys, values
        at = start + 2 * places
        tokens[at], tokens[at + 1] = keys[asked], values[asked]
        targets = np.full(self.length, NO_TARGET, np.int64)
        targets[at] = values[asked]
        return tokens, targets

    def _places(self, bits: np.ndarray) -> np.ndarray:
        # The first arrivals of exponential clocks are draws without repetition (Efraimidis and Spirakis, 2006).
        uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
        rates = np.arange(1, len(bits) + 1) ** (self.power - 1.0)
        return np.argsort(-np.log(uniform) / rates, kind="stable")[: self.queries]


def _permutation(bits: np.ndarray) -> np.ndarray:
    return np.argsort(bits, kind="stable")


class RecallStream(RowStream):
    """Problems of a split in the order of their numbers, whole ones side by side in rows of `length` tokens.

    documents: how many there are (None: never the same again). `endless`: then they begin again; otherwise the stream
    ends.
    """

    def __init__(
        self, task: RecallTask, split: str, *, length: int, documents: int | None, endless: bool, fingerprint: str
    ) -> None:
        super().__init__(length, fingerprint)
        self.task, self.split, self.documents, self.endless = task, split, documents, endless
        self.per_row = length // task.length
        self.begin()

    def _begin(self) -> None:
        before = self.read.get(self.fingerprint, [])
        self._first = sum(reading.rows * (reading.length // self.task.length) for reading in before)

    @property
    def rows(self) -> int | None:
        return None if self.endless or self.documents is None else -(-self.documents // self.per_row)

    def row(self, number: int) -> Row:
        if number < 0:
            raise ValueError(f"the row must not be negative; got {number}. Count rows from 0")
        tokens = np.full(self.length, BLANK, np.int64)
        targets = np.full(self.length, NO_TARGET, np.int64)
        first, n = self._first + number * self.per_row, self.task.length
        numbers = range(first, first + self.per_row)
        if self.rows is not None:
            numbers = [document for document in numbers if document < (self.documents or 0)]
        elif self.documents is not None:
            numbers = [document % self.documents for document in numbers]
        for place, document in enumerate(numbers):
            part = slice(place * n, (place + 1) * n)
            tokens[part], targets[part] = self.task.problem(self.split, document)
        return Row(tokens, targets, [n] * len(numbers))


@dataclass(frozen=True)
class RecallCorpus:
    """Recall problems in two streams of rows: `train`, endless, and `validation`, drawn apart from it."""

    task: RecallTask
    train: RecallStream
    validation: RecallStream

    @property
    def vocabulary_size(self) -> int:
        """Ids are smaller."""
        return self.task.vocabulary

    @property
    def chance(self) -> float:
        """The accuracy of guessing among all values."""
        return 1 / self.task.values

    @property
    def summary(self) -> str:
        task, drawn = self.task, self.train.documents
        spread = "" if task.spread is None else f" spread over {task.spread}"
        return (
            f"{'endless' if drawn is None else drawn} training problems, {self.validation.documents} held out, of "
            f"{task.pairs} pairs{spread} and {task.queries} queries in {task.length} tokens"
        )


def open_recall(settings: DataSettings) -> RecallCorpus:
    """The problems of `data.recall`. Raises ValueError for settings that do not fit and for those it ignores."""
    _refuse(settings)
    chosen = settings.recall
    task = RecallTask(
        length=settings.sequence_length if chosen.length is None else chosen.length,
        pairs=chosen.pairs,
        queries=chosen.pairs if chosen.queries is None else chosen.queries,
        vocabulary=DEFAULT_VOCABULARY if settings.vocabulary_size is None else settings.vocabulary_size,
        power=chosen.power,
        filler=chosen.filler,
        seed=chosen.seed,
        spread=chosen.spread,
    )
    _check(task, settings)
    given = {name: value for name, value in asdict(task).items() if value is not None}
    made_of = {"format": FORMAT, **given, "documents": settings.max_documents}
    fingerprint = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()

    def stream(split: str, documents: int | None, endless: bool) -> RecallStream:
        length = settings.sequence_length
        return RecallStream(task, split, length=length, documents=documents, endless=endless, fingerprint=fingerprint)

    train = stream("train", settings.max_documents, True)
    return RecallCorpus(task, train, stream("validation", chosen.validation_documents, False))


def _refuse(settings: DataSettings) -> None:
    refuse_ignored(settings)
    for name in ("tokenizer", "bos", "validation_fraction", "cache_dir", "packing", "audit"):
        value = getattr(settings, name)
        if value != getattr(DataSettings, name):
            raise ValueError(
                f"data.{name} must be left out with data=recall, which does not use it; got {value!r}. Remove it"
            )


def _check(task: RecallTask, settings: DataSettings) -> None:
    chosen = settings.recall
    for name, value, least in (
        ("data.recall.pairs", task.pairs, 1),
        ("data.recall.queries", task.queries, 1),
        ("data.recall.validation_documents", chosen.validation_documents, 1),
        ("data.max_documents", settings.max_documents, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}. Raise it")
    if task.spread is not None and task.spread < 2 * task.pairs:
        raise ValueError(
            f"data.recall.spread must be at least {2 * task.pairs}, two tokens for each of {task.pairs} pairs; got "
            f"{task.spread}. Raise it, or leave it out for pairs one after another"
        )
    needed = task.before_queries + 2 * task.queries
    if task.length < needed:
        length = "data.sequence_length" if chosen.length is None else "data.recall.length"
        spread = f"data.recall.spread={task.spread}"
        pairs = f"two tokens for each of {task.pairs} pairs" if task.spread is None else spread
        raise ValueError(
            f"{length} must be at least {needed}, {pairs} and two for each of {task.queries} queries; got "
            f"{task.length}. Raise it, or lower data.recall.pairs, queries or spread"
        )
    if settings.sequence_length % task.length:
        raise ValueError(
            f"data.recall.length must divide data.sequence_length={settings.sequence_length}, so that rows hold whole "
            f"problems; got {task.length}. Change one of them"
        )
    if task.vocabulary < 2 * (task.pairs + 1):
        raise ValueError(
            f"data.vocabulary_size must be at least {2 * (task.pairs + 1)}, half of it for {task.pairs} keys and a "
            f"blank; got {task.vocabulary}. Raise it, or lower data.recall.pairs"
        )
    if not 0 < task.power <= 1:
        raise ValueError(f"data.recall.power must lie in (0, 1]; got {task.power}. 1 is anywhere alike, 0.01 near")
    if task.filler not in FILLERS:
        raise ValueError(f"data.recall.filler must be one of {', '.join(FILLERS)}; got {task.filler!r}. Choose one")
    if not 0 <= task.seed < 2**64:
        raise ValueError(f"data.recall.seed must lie within 0..2^64-1; got {task.seed}. Choose another")
