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
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from None
        if isinstance(cause, ImportError | AttributeError | TypeError):
            raise ValueError(f"model must name classes and settings that exist; {cause}. Check model.*") from error
        raise
    if not isinstance(built, LanguageModel):
        raise ValueError(f"model._target_ must be a LanguageModel; got {type(built).__name__}")
    return built
