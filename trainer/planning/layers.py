"""Layers: a deep model's numbers from shallow ones, since layers of one item of the pattern are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...models.language_model import LanguageModel
from ..memory.account import Account
from ..memory.states import Share

Build = Callable[[], LanguageModel]
BuildModel = Callable[[dict[str, Any]], LanguageModel]


@dataclass(frozen=True)
class Shallow:
    """A model of one layer for each item of the pattern, and the same with one of them twice.

    Whatever adds up over layers is that of `base`, and for each further layer of an item what its second layer adds.
    `more` has for each item its further layers and the model with two; it is empty where a model is taken as it is.
    """

    base: Build
    more: Mapping[str, tuple[int, Build]]

    @classmethod
    def of(cls, build: BuildModel, model: Mapping[str, Any], names: Iterable[str]) -> Shallow:
        """`names`: of the mixers of each layer of the model that the configuration describes."""
        names = list(names)
        counts = Counter(names)
        whole = cls(lambda: build(dict(model)), {})
        if sum(counts.values()) <= len(counts) + 2 or "pattern" not in model:
            return whole

        if model.get("multi_token_prediction"):  # whose blocks repeat the last layer
            counts[names[-1]] = counts.pop(names[-1])

        def cut(twice: str | None = None) -> Build:
            pattern = [item for name in counts for item in ([name, name] if name == twice else [name])]
            return lambda: build({**model, "depth": len(pattern), "pattern": pattern})

        return cls(cut(), {name: (count - 1, cut(name)) for name, count in counts.items() if count > 1})

    def sum(self, count: Callable[[Build], Mapping[Any, float]]) -> dict[Any, float]:
        """What `count` counts, by key, over all layers of the deep model."""
        base = count(self.base)
        total: dict[Any, float] = dict(base)
        for layers, twice in self.more.values():
            found = count(twice)
            for key in {*found, *base}:
                total[key] = total.get(key, 0) + layers * (found.get(key, 0) - base.get(key, 0))
        return total

    def account(self, make: Callable[..., Account], *, backward: bool = True) -> Account:
        """The account of the deep model but for its states and its working memory, which are those of `base`.

        `make(build, backward=…)` makes the account of a model; without backward, of what it keeps alone.
        """
        first, made = None, {}

        def shares(build: Build) -> dict[tuple[str, bool, str], float]:
            nonlocal first
            account = make(build, backward=backward and first is None)
            first = first or account
            found = dict[tuple[str, bool, str], float]()
            for share in account.kept:
                found[share.part, share.host, "fixed"] = share.fixed
                found[share.part, share.host, "per token"] = share.per_token
            return found

        for (part, host, what), value in self.sum(shares).items():
            made.setdefault((part, host), {})[what] = value
        assert first is not None
        kept = tuple(Share(part, of["fixed"], of["per token"], host) for (part, host), of in made.items())
        return replace(first, kept=kept)
