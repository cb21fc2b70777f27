"""Models and callbacks from configuration: the only place where a `_target_` becomes an object."""

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
from ..trainer.callback import Callback
from .configuration import working_directory

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")  # keys that are not settings
PARTS = ("feed_forward", "block")  # what every layer makes anew, beside its mixer


def build(model: dict[str, Any]) -> LanguageModel:
    """The model that a configuration such as those in conf/model describes.

    Raises ValueError for settings that the model refuses, and for a `_target_` that cannot be found or does not take
    its settings. Errors of a user's own module or constructor keep their traceback.
    """
    working_directory.use()
    _check_targets(model, "model")
    _check_parts(model)
    built = _instantiated(model)
    if not isinstance(built, LanguageModel):
        raise ValueError(f"model._target_ must make a LanguageModel; got {name_of(type(built))}. Name another class")
    return built


def build_callbacks(callbacks: dict[str, Any]) -> dict[str, Callback]:
    """The callbacks of `callbacks.NAME`, by name. Raises ValueError as `build` does."""
    working_directory.use()
    built = {}
    for name, part in callbacks.items():
        setting = f"callbacks.{name}"
        _check_has_target(part, setting)
        _check_targets(part, setting)
        function = _look_up(part["_target_"], setting)
        if not isinstance(function, type) or not issubclass(function, Callback):
            raise ValueError(
                f"{setting}._target_ must be a Callback; got {name_of(function)}. Derive it from "
                f"{Callback.__module__}.{Callback.__name__}"
            )
        check_settings(function, {name: value for name, value in part.items() if name not in HYDRA_KEYS}, setting)
        if part.get("_partial_"):
            raise ValueError(f"{setting}._partial_ must be left out, since the run needs it made; got true. Remove it")
        built[name] = _instantiated(part)
    return built


def _instantiated(settings: dict[str, Any]) -> Any:
    """What Hydra makes of them; errors are those of the constructor."""
    try:
        return instantiate(settings, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from cause.__cause__


def _check_parts(model: dict[str, Any]) -> None:
    function = _look_up(model["_target_"], "model")
    if isinstance(function, type) and not issubclass(function, LanguageModel):
        raise ValueError(
            f"model._target_ must be a LanguageModel; got {name_of(function)}. A mixer goes into model.mixers, under a "
            "name that model.pattern uses"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values()):
        return  # a user's own model, which passes on settings that it does not name
    check_settings(function, {name: value for name, value in model.items() if name not in HYDRA_KEYS}, "model")
    mixers = model.get("mixers")
    if not isinstance(mixers, dict) or not mixers:
        raise ValueError(f"model.mixers must name at least one mixer; got {mixers!r}. Give model.mixers.NAME._target_")
    parts = {f"model.mixers.{name}": part for name, part in mixers.items()}
    parts |= {f"model.{name}": model[name] for name in PARTS if model.get(name) is not None}
    for setting, part in parts.items():
        _check_has_target(part, setting)
        if part.get("_partial_") is not True:
            raise ValueError(
                f"{setting}._partial_ must be true, since every layer makes its own; got {part.get('_partial_')!r}. "
                f"Give {setting}._partial_=true"
            )


def _check_has_target(part: Any, setting: str) -> None:
    if not isinstance(part, dict) or not part.get("_target_"):
        raise ValueError(
            f"{setting}._target_ must be the dotted path of a class; got none. Give it, as in "
            f"{setting}._target_=package.module.Class"
        )


def _check_targets(settings: Any, setting: str) -> None:
    """Raises ValueError for a `_target_` at any depth that cannot be found."""
    if isinstance(settings, list):
        for index, item in enumerate(settings):
            _check_targets(item, f"{setting}[{index}]")
    if isinstance(settings, dict):
        if "_target_" in settings:
            _look_up(settings["_target_"], setting)
        for name, value in settings.items():
            _check_targets(value, f"{setting}.{name}")


def _look_up(target: Any, setting: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names. What a module raises while it is imported passes through."""
    must = f"{setting}._target_ must be the dotted path of a class; got {target!r}"
    if not isinstance(target, str) or not all(name.isidentifier() for name in target.split(".")):
        raise ValueError(f"{must}. Write package.module.Class")
    first, *rest = target.split(".")
    beside = [path.stem for path in Path.cwd().glob("*.py")]
    named, path = _imported(first, setting), first
    if named is None:
        hint = _near(first, [*beside, "longreach"]) or "Start from its folder, or put that into PYTHONPATH"
        raise ValueError(f"{must}. No module {first} was found. {hint}")
    for name in rest:
        inner = getattr(named, name, None)
        if inner is None and hasattr(named, "__path__"):
            inner = _imported(f"{path}.{name}", setting)
        if inner is None:
            raise ValueError(f"{must}. {path} has no {name}. {_nearest(name, named, path)}")
        named, path = inner, f"{path}.{name}"
    if not callable(named):
        hint = f", such as {' or '.join(_classes(named, path)[:3])}" if _classes(named, path) else ""
        raise ValueError(f"{must}, a {name_of(type(named))}. Name one of its classes{hint}")
    return named


def _imported(path: str, setting: str) -> Any:
    """The module, or None if there is none."""
    try:
        with naming(f"{setting}._target_, importing {path}"):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # something that the module imports
            raise
        return None


def _nearest(name: str, owner: Any, path: str) -> str:
    """A hint at what the writer of `path.name` may have meant."""
    classes = [each.rpartition(".")[2] for each in _classes(owner, path)]
    near = _near(name, classes) or _near(name, _names(owner)) or _near_module(name, owner, path)
    return near or f"Known: {', '.join(classes[:8]) or 'no class'}"


def _names(owner: Any) -> list[str]:
    """The public names of a module or class, but for modules."""
    public = [name for name in dir(owner) if not name.startswith("_")]
    return [name for name in public if not isinstance(getattr(owner, name, None), ModuleType)]


def _near_module(name: str, owner: Any, path: str) -> str:
    """A hint at the module of a similar name in the package or its subpackages."""
    modules = pkgutil.walk_packages(getattr(owner, "__path__", []), f"{path}.", onerror=lambda _: None)
    paths = {module.name.rpartition(".")[2]: module.name for module in modules}
    near = difflib.get_close_matches(name, paths, n=1)
    return f"Did you mean {paths[near[0]]}?" if near else ""


def _classes(owner: Any, path: str) -> list[str]:
    """The dotted paths of the classes that a module defines itself."""
    own = [name for name, value in vars(owner).items() if isinstance(value, type) and value.__module__ == path]
    return [f"{path}.{name}" for name in own]


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else ""
