"""Models by configuration: the only place where a `_target_` becomes an object."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ..models.language_model import LanguageModel
from ..models.mixer import check_settings, name_of, naming
from . import working_directory

HYDRAS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")  # keys that are no settings
PARTS = ("feed_forward", "block")  # and each of the mixers: what the model makes anew for every layer


def build(model: dict[str, Any]) -> LanguageModel:
    """The model of a configuration such as those of conf/model.

    Raises ValueError for settings that the model refuses, and for a `_target_` that cannot be found or does not take
    its settings. What a module or a constructor of the user's raises keeps its traceback.
    """
    working_directory.use()
    _check_targets(model, "model")
    _check_parts(model)
    try:
        built = instantiate(model, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from cause.__cause__
    if not isinstance(built, LanguageModel):
        raise ValueError(f"model._target_ must make a LanguageModel; got {name_of(type(built))}. Name another class")
    return built


def _check_parts(model: dict[str, Any]) -> None:
    function = _found(model["_target_"], "model")
    if isinstance(function, type) and not issubclass(function, LanguageModel):
        raise ValueError(
            f"model._target_ must be a LanguageModel; got {name_of(function)}. A mixer goes into model.mixers, under a "
            "name that model.pattern uses"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values()):
        return  # a model of one's own, which hands on what it does not know
    check_settings(function, {name: value for name, value in model.items() if name not in HYDRAS}, "model")
    mixers = model.get("mixers")
    if not isinstance(mixers, dict) or not mixers:
        raise ValueError(f"model.mixers must name at least one mixer; got {mixers!r}. Give model.mixers.NAME._target_")
    parts = {f"model.mixers.{name}": part for name, part in mixers.items()}
    parts |= {f"model.{name}": model[name] for name in PARTS if model.get(name) is not None}
    for setting, part in parts.items():
        if not isinstance(part, dict) or not part.get("_target_"):
            raise ValueError(
                f"{setting}._target_ must be the dotted path of a class; got none. Give it, as in "
                f"{setting}._target_=package.module.Class"
            )
        if part.get("_partial_") is not True:
            raise ValueError(
                f"{setting}._partial_ must be true, since every layer makes its own; got {part.get('_partial_')!r}. "
                f"Give {setting}._partial_=true"
            )


def _check_targets(settings: Any, setting: str) -> None:
    """Raises ValueError for a `_target_`, here or further in, that cannot be found."""
    if isinstance(settings, list):
        for index, item in enumerate(settings):
            _check_targets(item, f"{setting}[{index}]")
    if isinstance(settings, dict):
        if "_target_" in settings:
            _found(settings["_target_"], setting)
        for name, value in settings.items():
            _check_targets(value, f"{setting}.{name}")


def _found(target: Any, setting: str) -> Callable[..., Any]:
    """What a `_target_` names. What a module raises when it is imported is its own."""
    must = f"{setting}._target_ must be the dotted path of a class; got {target!r}"
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")):
        raise ValueError(f"{must}. Write package.module.Class")
    first, *rest = target.split(".")
    beside = [path.stem for path in Path.cwd().glob("*.py")]
    hint = _near(first, [*beside, "longreach"]) or "Start from its folder, or put that into PYTHONPATH"
    found, path = _imported(first, setting, f"{must}. No module {first} was found. {hint}"), first
    for name in rest:
        classes = [each.rpartition(".")[2] for each in _classes(found, path)]
        near = _near(name, classes) or _near(name, _names(found)) or _near_module(name, found, path)
        hint = near or f"Known: {', '.join(classes[:8]) or 'no class'}"
        missing = f"{must}. {path} has no {name}. {hint}"
        path = f"{path}.{name}"
        if hasattr(found, name):
            found = getattr(found, name)
        elif isinstance(found, ModuleType) and hasattr(found, "__path__"):
            found = _imported(path, setting, missing)
        else:
            raise ValueError(missing)
    if not callable(found):
        hint = f", such as {' or '.join(_classes(found, path)[:3])}" if _classes(found, path) else ""
        raise ValueError(f"{must}, a {name_of(type(found))}. Name one of its classes{hint}")
    return found


def _imported(path: str, setting: str, missing: str) -> Any:
    """The module, or a ValueError that says `missing`."""
    try:
        with naming(f"{setting}._target_, importing {path}"):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # something that the module imports
            raise
        raise ValueError(missing) from None


def _names(found: Any) -> list[str]:
    """The public names of a module or class, but for modules."""
    public = [name for name in dir(found) if not name.startswith("_")]
    return [name for name in public if not isinstance(getattr(found, name, None), ModuleType)]


def _near_module(name: str, found: Any, path: str) -> str:
    """The module of a similar name in the package or further in."""
    modules = pkgutil.walk_packages(getattr(found, "__path__", []), f"{path}.", onerror=lambda _: None)
    paths = {module.name.rpartition(".")[2]: module.name for module in modules}
    near = difflib.get_close_matches(name, paths, n=1)
    return f"Did you mean {paths[near[0]]}?" if near else ""


def _classes(found: Any, path: str) -> list[str]:
    """The dotted paths of the classes that a module defines itself."""
    own = [name for name, value in vars(found).items() if isinstance(value, type) and value.__module__ == path]
    return [f"{path}.{name}" for name in own]


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else ""
