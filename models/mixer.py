"""Mixer: the base class of what mixes tokens, and how the parts of a model are built from their settings."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from ..parallel.sequence import Sequence
from .part import Composite, Part, shape_of

UNMEASURED = "whose largest logits are not measured"
RECIPE = "examples/04_add_a_mixer.md"
Constructor = TypeVar("Constructor", bound=Callable[..., None])
SCALARS = (bool, int, float, str)


class Mixer(Part):
    """Projections and gates around an op of `parallel.ops`.

    Subclasses take plain keyword arguments: `width` always, and if they declare them `layer` (index in the whole model,
    from 0), `depth`, `name` (in the pattern) and `occurrence` (how many earlier mixers of the model have it). They
    import token mixing from `parallel.ops` alone, so that they never see a rank, and end in a linear layer called
    `output`. What a mixer may state besides is listed in `Part`.
    """

    outputs = ("output",)
    small: Mapping[str, int] = MappingProxyType(
        {
            "heads": 4, "kv_heads": 2, "key_heads": 2,
            "head_dim": 8, "key_dim": 8, "value_dim": 16, "state": 6, "gate_rank": 8,
        }
    )  # fmt: skip

    def mixing_flops(self, seq: Sequence) -> int:
        """Forward FLOPs of the ops on the tokens of `seq`'s rank; linear layers are counted by `flops`."""
        raise NotImplementedError


class PartError(RuntimeError):
    """A part of the model failed with a ValueError of its own, which would pass for one about settings."""


@contextmanager
def naming(part: str, owners: Iterable[tuple[str, nn.Module]] = ()) -> Iterator[None]:
    """Errors within are said to be of `part`, or of that of the named modules `owners` which was at work.

    A ValueError that LongReach's own code raises is about settings, and begins with the name. Any other error keeps its
    traceback and gets the name as a note; a ValueError is the cause of a `PartError` then.
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
        at_work = {id(frame.f_locals.get("self")) for frame in frames}
        owned = [name for name, module in owners if at_work & {id(each) for each in module.modules()}]
        named = (owned or [part])[0]
        if not isinstance(error, ValueError):
            error.add_note(named)
            raise
        packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
        own = __name__.partition(".")[0]
        if set(packages) <= {own, "hydra", "torch", "contextlib"} and packages[-1:] in ([], [own]):
            raise ValueError(f"{named}: {error}") from None
        raise PartError(f"{named}: {type(error).__name__}: {error}") from error


def construct(part: Callable[..., nn.Module], setting: str, **available: Any) -> nn.Module:
    """Calls a partial from the configuration with those of the `available` arguments that its signature declares.

    Raises ValueError, naming `setting`, for what is no partial, for what `check_settings` refuses, and for a class that
    does not begin by making itself a module. What the part itself raises is `naming`'s.
    """
    if isinstance(part, nn.Module) or not callable(part):
        raise ValueError(
            f"{setting} must be a partial, from which every layer makes its own; got a {type(part).__name__}. "
            "Give it _partial_: true"
        )
    function = part.func if isinstance(part, partial) else part
    given = dict(part.keywords) if isinstance(part, partial) else {}
    check_settings(function, given, setting, available)
    known = inspect.signature(function).parameters
    arguments = {name: value for name, value in available.items() if name in known and name not in given}
    with naming(f"{setting} ({name_of(function)})"):
        try:
            made = part(**arguments)
        except RuntimeError as error:
            if "negative dimension" not in str(error):
                raise
            raise ValueError(f"sizes must be positive; got a tensor of {str(error).rpartition(': ')[2]}") from None
    if not isinstance(made, nn.Module):
        raise ValueError(f"{setting} must make a torch.nn.Module; got a {type(made).__name__}. Name a class of them")
    if "_modules" not in vars(made):
        raise ValueError(f"{setting} must be made by {name_of(function)}.__init__ calling super().__init__() first")
    with naming(f"{setting} ({name_of(function)})"):
        _refuse_empty(made)
    return made


def _refuse_empty(part: nn.Module) -> None:
    """Raises ValueError for a parameter without an element, whose part would fail at its first token, or do nothing."""
    for name, parameter in part.named_parameters():
        if not all(shape := shape_of(parameter)):
            raise ValueError(f"sizes must be positive; got {name} of {list(shape)}")


def check_settings(
    function: Callable[..., Any], given: Mapping[str, Any], setting: str, available: Collection[str] = ()
) -> None:
    """Raises ValueError, naming `setting` and near matches, for settings that do not fit the function's signature.

    Unknown names, missing ones that are not `available` either, numbers and texts of another type than it declares, and
    None where it declares none; and a signature that does not name its settings, behind which all of these would hide.
    """
    parameters, called = inspect.signature(function).parameters, name_of(function)
    for name, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "positional-only ")
            raise ValueError(
                f"{setting} must be a class whose constructor names its settings; {called} takes {stars}{name}. "
                "Declare each of them: def __init__(self, *, width: int, heads: int)"
            )
    hints = _type_hints(function)
    for name, value in given.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(parameters)}"
            raise ValueError(f"{setting} must use settings of {called}; got {name!r}. {hint}")
        if not _fits(value, hints.get(name, Any)):
            default = parameters[name].default
            hint = "" if default is inspect.Parameter.empty else f", or leave it out: it is {default!r} then"
            expected = " or ".join(map(name_of, _alternatives(hints[name]))).replace("NoneType", "null")
            raise ValueError(f"{setting}.{name} must be of type {expected}; got {value!r}. Change it{hint}")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in given and name not in available
    ]
    if missing:
        got = ", ".join(given) or "nothing"
        raise ValueError(f"{setting} must give {', '.join(missing)}; got {got}. {called} has no default for it")


def small_sizes(function: Callable[..., Any]) -> dict[str, int]:
    """`small` of a mixer's or feed-forward layer's class and its base classes, of the settings that it takes."""
    sizes: dict[str, int] = {}
    for each in reversed(inspect.getmro(function) if inspect.isclass(function) else ()):
        sizes |= vars(each).get("small", {})
    return {name: sizes[name] for name in inspect.signature(function).parameters if name in sizes}


def also_takes(base: type) -> Callable[[Constructor], Constructor]:
    """Decorates a constructor that passes its `**settings` to that of `base`: its signature names those of both.

    So they are checked as those of any other constructor are, and written down once.
    """

    def decorate(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor).parameters
        named = {name: parameter for name, parameter in own.items() if parameter.kind is not parameter.VAR_KEYWORD}
        added = {name: each for name, each in inspect.signature(base).parameters.items() if name not in own}
        parameters = sorted([*added.values(), *named.values()], key=lambda parameter: parameter.kind)  # self is first
        constructor.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        constructor.__annotations__ = {**_type_hints(base), **constructor.__annotations__}
        return constructor

    return decorate


def name_of(function: Callable[..., Any]) -> str:
    """What messages call a class or function."""
    return getattr(function, "__name__", type(function).__name__)


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)  # type: ignore[misc]
    except Exception:  # annotations are free to name what does not exist at run time
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the declared type, where that is made of scalars, lists, mappings and None."""
    allowed = _alternatives(hint)
    if not all(each in (*SCALARS, NoneType, list, tuple, dict) for each in allowed):
        return True
    listed = isinstance(value, list | tuple) and (list in allowed or tuple in allowed)  # YAML has no tuples
    return listed or type(value) in allowed or (type(value) is int and float in allowed)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is, without what their elements are."""
    several = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_origin(each) or each for each in several)


def check_part(part: nn.Module, setting: str) -> Part:
    """The module as a part of a block. Raises ValueError, naming `setting`, for what it does not state as parts do."""
    made = type(part).__name__
    if not isinstance(part, Part):
        raise ValueError(
            f"{setting} must be a mixer or a feed-forward layer; got {made}, which is neither. Derive it from "
            "longreach.models.mixer.Mixer or longreach.models.part.FeedForward"
        )
    for method, what in (("forward", "maps x [B, T, D]"), ("mixing_flops", "counts its ops' FLOPs")):
        if getattr(type(part), method) in (Part.forward, Mixer.mixing_flops):
            raise ValueError(f"{setting} must define {method}, which {what}; {made} has none. {RECIPE} shows one")
    for attribute in ("publishes", "reads", "sums", "outputs", "no_weight_decay", "matrices", "in_float32"):
        names = getattr(part, attribute)
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{setting} must have names in {made}.{attribute}; got {names!r}. Write ('name',)")
    if not isinstance(part.losses, Mapping) or not all(type(weight) in (int, float) for weight in part.losses.values()):
        raise ValueError(
            f"{setting} must have weights by name in {made}.losses; got {part.losses!r}. Write {{'name': 0.01}}"
        )
    if part.sums and type(part).update is Part.update:
        raise ValueError(f"{setting} must define update, which is told its sums; {made} has none")
    parameters = dict(part.named_parameters())
    if unknown := [name for name in part.no_weight_decay if name not in parameters]:
        raise ValueError(
            f"{setting} must name parameters in {made}.no_weight_decay; got {', '.join(unknown)}. "
            f"Known: {', '.join(parameters)}"
        )
    own = [name for name in parameters if "." not in name]
    for attribute in ("matrices", "in_float32"):
        if unknown := [name for name in getattr(part, attribute) if name not in own]:
            raise ValueError(
                f"{setting} must name its own parameters in {made}.{attribute}; got {', '.join(unknown)}. "
                f"Known: {', '.join(own) or 'none'}; a layer inside names its own"
            )
    return part


def check_composite(made: nn.Module, setting: str) -> Composite:
    """The module as a composite. Raises ValueError, naming `setting`, for any other."""
    if not isinstance(made, Composite):
        raise ValueError(
            f"{setting} must join parts; got {type(made).__name__}. Derive it from longreach.models.block.Block "
            "or longreach.models.part.Composite"
        )
    return made


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless groups of query heads can share the key/value heads."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}; got {kv_heads}")


def head_size(setting: str, width: int, heads: int, own: str | None = None) -> int:
    """The width of one head, or a ValueError that names the setting. own: the setting of a head's size, if any."""
    if heads < 1 or width % heads:
        instead = f", or give {own}" if own else ""
        raise ValueError(f"{setting} must divide width={width}; got {heads}. Change it{instead}")
    return width // heads
