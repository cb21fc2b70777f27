"""Models by configuration: the only place where a `_target_` becomes an object."""

from __future__ import annotations

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ..models.language_model import LanguageModel


def build(model: dict[str, Any]) -> LanguageModel:
    """The model of a configuration such as those of conf/model.

    Raises ValueError for settings that the model refuses, and for a `_target_` that cannot be imported or does not
    take its settings.
    """
    try:
        built = instantiate(model, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        raise ValueError(f"model must be a configuration that can be made: {error}") from error
    if not isinstance(built, LanguageModel):
        raise ValueError(f"model._target_ must be a LanguageModel; got {type(built).__name__}")
    return built
