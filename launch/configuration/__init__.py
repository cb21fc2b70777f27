"""Configuration: Hydra's schemas and short names, arguments that launchers add, and errors with near matches."""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ...trainer.ranks import launchers
from ...trainer.settings import Settings
from . import items, page

CONFIGURATIONS = "../conf"
PACKAGE = Path(__file__).resolve().parents[2]
Schema = TypeVar("Schema")
ConfigurationError = (HydraException, OmegaConfBaseException)
HYDRA_FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
)  # fmt: skip
TYPES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
LISTED = {"Integer": "a list of integers", "Float": "a list of numbers", "Boolean": "a list of true and false"}
# Settings to which + may add one that the configuration has not, since their schema is open.
OPEN = ("model.", "data.mixture.", "engine.config.", "callbacks.", "parallel.mixers.", "optimizer.groups.")
MANY = 12
# One text in Hydra's quotes and no more, unlike '"Yes," she said, "no"'.
QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*["]""", flags=re.DOTALL)


def register(name: str, schema: type) -> None:
    """Makes a dataclass known to Hydra as the schema `name`, so that wrong names and types are refused."""
    node = OmegaConf.structured(schema)
    for group in node:
        part = node._get_node(group)
        if not isinstance(part, DictConfig):
            continue
        # Groups of frozen dataclasses would refuse every override.
        OmegaConf.set_readonly(part, None)
        for setting in part:
            value = part._get_node(setting)
            # A setting that is a dict of dataclasses takes keys of any name, with the settings of those alone.
            if isinstance(value, DictConfig) and dataclasses.is_dataclass(value._metadata.element_type):
                OmegaConf.set_struct(value, False)
    ConfigStore.instance().store(name=name, node=node)


def model_sizes() -> dict[str, str]:
    """The sizes of conf/model by their short names, as "llama_1b": "llama/1b"."""
    paths = sorted((PACKAGE / "conf" / "model").glob("*/[!_]*.yaml"))
    return {f"{path.parent.name}_{path.stem}": f"{path.parent.name}/{path.stem}" for path in paths}


def register_sizes() -> None:
    """Makes the short names of sizes known to Hydra, for command lines and `defaults` alike."""
    for name, size in model_sizes().items():
        node = OmegaConf.create({"defaults": [f"{size}@_here_"]})
        ConfigStore.instance().store(group="model", name=name, node=node)


def run_main(compose: Callable[[], Any], config_name: str, texts: Collection[str] = ()) -> None:
    """Calls a function made by `hydra.main`; the first rank prints configuration errors as one message.

    texts: settings whose values are taken literally, not by Hydra's grammar.

    The other ranks wait for the launcher to end them: if one exited first, the launcher would end the first rank before
    it has printed.
    """
    other = other_checkout(Path.cwd())
    if other is not None and int(os.environ.get("RANK", "0")) == 0:
        print(
            f"note: this runs the LongReach in {PACKAGE}, not the one in {other}. To run that one: bash "
            f"{other}/launch/torchrun.sh, and after it also PYTHONPATH={other}/.cache/import python -m …",
            file=sys.stderr,
            flush=True,
        )
    if any(argument in page.FLAGS for argument in sys.argv[1:]):
        if int(os.environ.get("RANK", "0")) == 0:
            print(help_page(sys.modules[compose.__module__].__doc__ or "", config_name))
        sys.exit(0)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that errors come here rather than to Hydra's own printing
    sys.argv[1:] = [quoted(_as_field(argument), texts) for argument in without_launcher_arguments(sys.argv[1:])]
    try:
        _refuse_flags(sys.argv[1:])
        compose()
    except (*ConfigurationError, TypeError, ValueError) as error:
        if not (isinstance(error, (*ConfigurationError, FlagError)) or items.is_about_one(error)):
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            print(_as_written(explain(error, config_name, sys.argv[1:])), file=sys.stderr, flush=True)
        else:
            time.sleep(5)
        sys.exit(1)


def help_page(about: str, config_name: str) -> str:
    """What --help prints for the command that conf/<config_name>.yaml configures; `about` is its module's docstring."""
    (name, *_) = yaml.safe_load((PACKAGE / "conf" / f"{config_name}.yaml").read_text())["defaults"]
    schema = OmegaConf.get_type(ConfigStore.instance().load(f"{name}.yaml").node)
    assert schema is not None
    own = [part for part in vars(schema).get("__annotations__", {}) if schema.__base__ is Settings]
    groups = {group: options for group, options in page.groups(config_name).items() if not own or group in own}
    return page.page(about, schema(), groups, own)


def _as_field(argument: str) -> str:
    """`from=PATH` as `from_=PATH`: fields of dataclasses cannot have the names of Python's keywords."""
    name, equals, value = argument.partition("=")
    return f"{name}_{equals}{value}" if equals and keyword.iskeyword(name.lstrip("+")) else argument


def _as_written(message: str) -> str:
    """A message with the names of such fields as they are written on the command line."""
    return re.sub(r"\b([a-z]+)_\b", lambda m: m[1] if keyword.iskeyword(m[1]) else m[0], message)


def other_checkout(folder: Path) -> Path | None:
    """The checkout of LongReach that a folder is in, if it is not the one that runs."""
    for place in (folder, *folder.parents):
        if (place / "launch" / "train.py").is_file() and (place / "kernels").is_dir():
            return None if place.samefile(PACKAGE) else place
    return None


def join_launcher() -> None:
    """Takes this process's rank from whatever started it; ends a process that cannot join the others, with a reason."""
    try:
        note = launchers.adopt()
    except ValueError as error:
        if launchers.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if note:
        print(note, file=sys.stderr, flush=True)


def run_once() -> None:
    """For commands of one process: ends all others that a launcher may have started."""
    if launchers.rank() > 0:
        sys.exit(0)


class FlagError(ValueError):
    """Hydra's sweeps were asked for, or a flag that there is not."""


def _refuse_flags(arguments: list[str]) -> None:
    """Raises FlagError for flags that Hydra does not know, and for sweeps: -m, --multirun, hydra.mode=MULTIRUN.

    argparse lets one shorten flags. Hydra would run the jobs of a sweep one after another in the same processes, but
    those are one world: process groups, compiled ops and the engine's global state belong to the first job.
    """
    for argument in arguments:
        flag = argument == "-m" or (len(argument) > 3 and "--multirun".startswith(argument))
        if flag or re.fullmatch(r"\+*hydra\.mode=['\"]?(multirun|2)['\"]?", argument, flags=re.IGNORECASE):
            raise FlagError(
                f"{argument} must be left out; a command is one run, since its processes form one world. Start one "
                "command for each value: for x in 1 2 3; do … trainer.seed=$x; done"
            )
        name = argument.partition("=")[0]
        if name.startswith("--") and not any(known.startswith(name) for known in HYDRA_FLAGS):
            raise FlagError(
                f"an argument must be NAME=VALUE; got {argument}. Settings are written without dashes, such as "
                "trainer.steps=100; --help lists them"
            )


def without_launcher_arguments(arguments: list[str]) -> list[str]:
    """The arguments without the `--local_rank=N` that DeepSpeed's launcher adds and Hydra would refuse."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif re.fullmatch(r"--local[_-]rank", argument):
            skip = True
        elif not re.match(r"--local[_-]rank=", argument):
            kept.append(argument)
    return kept


def texts_of(schema: type, prefix: str = "") -> dict[str, bool]:
    """The dotted names of a dataclass's text settings, and whether each may be null."""
    texts: dict[str, bool] = {}
    for name, kind in get_type_hints(schema).items():
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if dataclasses.is_dataclass(kind):
            texts |= texts_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif str in options:
            texts[prefix + name] = type(None) in options
    return texts


def quoted(argument: str, texts: Collection[str]) -> str:
    """The override with its value in quotes, if it sets one of `texts` and is neither null nor already quoted.

    Otherwise 2024_10 would be the number 202410, a path with a comma a sweep, and a prompt with a parenthesis a
    function call. If `texts` says that a setting is never null, "null" is a text as well.
    """
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    if not equals or key not in texts:
        return argument
    nullable = texts[key] if isinstance(texts, Mapping) else True
    if (value == "null" and nullable) or QUOTED.fullmatch(value):
        return argument
    # A backslash counts before a quote, for Hydra, and before an interpolation, for OmegaConf.
    literal = re.sub(r"(\\*)\$\{", lambda m: m.group(1) * 2 + "\\${", value)
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m.group(1) * 2 + ("\\'" if m.group(2) else ""), literal)
    return f"{name}='{escaped}'"


def explain(error: Exception, config_name: str, overrides: list[str]) -> str:
    """What is wrong in one message, with names similar to an unknown one, instead of Hydra's."""
    if isinstance(error, FlagError):
        return f"error: {error}"
    lines = [str(error).partition("\nConfig search path")[0].strip()]
    lines[0] = re.sub(r"\n3\. To sweep over it, add --multirun.*", "", lines[0]).replace("\\'", "'")
    if isinstance(error, OverrideParseException):
        override = error.override
        if not override or re.fullmatch(r"[\w.@/+]+", override):
            return f"error: an argument must be NAME=VALUE; got {override!r}. Write {override}=VALUE; --help lists all"
        if dotted := items.with_dots(override):
            return f"error: an item of a list must be named by a dot and its number; got {override}. Write {dotted}"
        return f"error: {override!r} cannot be read: {lines[0]}\nPut the value in quotes: \"name='value'\""
    cause = error.__cause__
    if cause is not None and str(cause).splitlines():
        first = str(cause).splitlines()[0].strip()
        if first not in lines[0]:
            lines.append(first)
    message = "\n".join(lines)
    if told := items.explained(message, overrides):
        return f"error: {told}"
    option = re.search(r"Could not (?:find|load) '(\w+)/([^']*)'", message)
    key = re.search(r"Could not override '([^'@]+)'", message)
    merged = re.search(r"Error merging override [+~]*([\w.]+)=(.*)\n(.*)", message)
    value = merged and re.search(r"could not be converted to (\w+)", merged[3])
    there = re.search(r"Could not append to config\. An item is already at '([^']+)'", message)
    kept = re.search(r"Error merging override ~([\w.]+)\n.*does not support deletion", message)
    if option:
        return f"error: {_unknown_option(option[1], option[2], message, overrides)}"
    if key:
        given = next((item for item in overrides if item.lstrip("+~").startswith(f"{key[1]}=")), key[1])
        if key[1] in settings_names(config_name, overrides):
            return f"error: {key[1]} must get what it has not yet by +; got {given}. Write +{given}"
        near = " ".join([*_near(key[1], config_name, overrides), *_addition(key[1], given)])
        return f"error: {key[1]} must be the name of a setting; got {given}. {near or '--help lists them'}"
    if there:
        given = next((item for item in overrides if item.startswith(f"+{there[1]}=")), there[1])
        return f"error: {there[1]} must be set without +, since it is there; got {given}. Write {given.lstrip('+')}"
    if kept:
        return f"error: {kept[1]} must stay, with a value; got ~{kept[1]}. Leave ~{kept[1]} out for its default"
    if merged and "is not Optional" in merged[3]:
        return f"error: {merged[1]} must have a value; got {merged[2]}. Leave it out for its default"
    if merged and "is not a valid bool" in merged[3]:
        return f"error: {merged[1]} must be {TYPES['Boolean']}; got {merged[2]}"
    if merged and value:
        types = LISTED if merged[2].startswith("[") else TYPES
        return f"error: {merged[1]} must be {types.get(value[1], value[1])}; got {merged[2]}"
    if merged and "ListConfig" in merged[3]:
        return f"error: {merged[1]} must be a list; got {merged[2]}. Write '{merged[1]}=[{merged[2]}]'"
    if merged and "is not a subclass of" in merged[3]:
        return f"error: {merged[1]} must be settings, each by its name; got {merged[2]}. Write {merged[1]}.NAME=VALUE"
    missing = key or re.search(r"Key '([^'@]+)'", message)
    return "\n".join([f"error: {message}", *(_near(missing[1], config_name, overrides) if missing else [])])


def _unknown_option(group: str, name: str, message: str, overrides: list[str]) -> str:
    options = re.findall(r"^\t([^_\s]\S*)$", message, flags=re.MULTILINE)
    chosen = next((item.rpartition("=")[0] for item in overrides if item.endswith(f"={name}")), group)
    near = _suggest(name, options, lambda option: f"{chosen}={option}")
    among = ", ".join(options) if len(options) <= MANY else f"the files of conf/{group}"
    return " ".join([f"{chosen.lstrip('+')} must be one of {among}; got {name!r}.", *(near or ["--help lists all"])])


def _addition(key: str, given: str) -> list[str]:
    return [f"To add one that the configuration leaves out: +{given}"] if key.startswith(OPEN) else []


def _near(key: str, config_name: str, overrides: list[str]) -> list[str]:
    if "/" in key:  # a family's folder, taken for a group
        return _suggestion([re.sub(r"^(\w+)/(\w+)=", r"\1=\2/", item) for item in overrides if item.startswith(key)])
    known = [name for name in settings_names(config_name, overrides) if not key.startswith(f"{name}.")]
    prefix, last = (key.rpartition(".")[0], key.rpartition(".")[2])
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = _suggestion(same[:3]) or _suggest(key, known, str)
    if near:
        return near
    elsewhere = [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.8)]
    if elsewhere:
        return _suggestion(elsewhere[:3])
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    return [f"Known: {', '.join(siblings)}"] if siblings else []


def _suggest(name: str, known: list[str], form: Callable[[str], str]) -> list[str]:
    return _suggestion([form(match) for match in difflib.get_close_matches(name, known, n=3, cutoff=0.6)])


def _suggestion(names: list[str]) -> list[str]:
    return [f"Did you mean {' or '.join(names)}?"] if names else []


def settings_names(config_name: str, overrides: list[str]) -> list[str]:
    """Every dotted name of the configuration, with the groups chosen in `overrides` where those compose."""
    groups = [item for item in overrides if re.match(r"(\+?[\w/]+@[\w.]+|[\w/]+)=", item)]
    for chosen in (groups, []):
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(PACKAGE / "conf"), version_base="1.3"):
                composed = hydra.compose(config_name=config_name, overrides=chosen)
            return _names(OmegaConf.to_container(composed, resolve=False), "")
        except ConfigurationError:
            continue
    return []


def _names(value: Any, prefix: str) -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    names = [] if not prefix else [prefix]
    for key, item in value.items():
        names += _names(item, f"{prefix}.{key}" if prefix else str(key))
    return names


def to_schema(config: DictConfig, schema: type[Schema]) -> Schema:
    """The schema's object, with plain lists and dicts.

    Raises ValueError for names that `+` has added to it, and for settings that a preset leaves open.
    """
    try:
        settings = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} must be given; got ???. Give {error.full_key}=…") from None
    assert isinstance(settings, schema)
    _refuse_unknown(settings, "")
    return settings


def _refuse_unknown(settings: Any, prefix: str) -> None:
    known = [field.name for field in dataclasses.fields(settings)]
    for name, value in vars(settings).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(prefix + name for name in known)}"
            )
            raise ValueError(f"{prefix}{name} must be a setting; got a name that nothing reads. {hint}")
        if dataclasses.is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{name}.")


def choices() -> dict[str, Any]:
    """The option chosen from each group."""
    return dict(HydraConfig.get().runtime.choices)


def overrides() -> list[str]:
    """What the command line changed."""
    return list(HydraConfig.get().overrides.task)


def values_of(overrides: list[str], group: str) -> dict[str, Any]:
    """What overrides of settings of a group say, as nested dicts without the group's name."""
    made = OmegaConf.create()
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(made, override.key_or_group, override.value(), force_add=True)
    return {} if not overrides else OmegaConf.to_container(made[group], resolve=True)  # type: ignore[return-value]


def quiet_libraries() -> None:
    """Silences libraries' informational messages; their warnings stay."""
    for name in ("datasets", "huggingface_hub", "urllib3", "matplotlib", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
