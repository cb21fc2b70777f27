"""The files of a Hugging Face model: safetensors in one file or in shards with an index, config.json, tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..part import Cut, named_weights, shape_of
from .tensors import Recipe, Tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder
)
CONFIG = "config.json"
GENERATION = "generation_config.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class Header(NamedTuple):
    """Where a tensor is and what it is, known without reading it. name: in its file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder, listed from the headers alone and read one at a time.

    aliases: (regular expression, replacement) of names that other versions write: they are known by the replaced ones.

    Raises ValueError for a folder without safetensors, an index that does not match its shards, a truncated file.
    """

    def __init__(self, path: str | Path, aliases: Iterable[tuple[str, str]] = ()) -> None:
        self.path = Path(path)
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, Any] = {}
        for file, names in self._files():
            handle = self._handle(file)
            held = set(handle.keys())
            if names is not None and names - held:
                raise ValueError(
                    f"{self.path / INDEX} must name tensors that {file.name} holds; got {_listed(names - held)}. "
                    "Download the model again"
                )
            for name in sorted(held if names is None else names):
                part = handle.get_slice(name)
                known = name
                for pattern, replacement in aliases:
                    known = re.sub(pattern, replacement, known)
                self.headers[known] = Header(file, name, tuple(part.get_shape()), part.get_dtype())

    def _files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Each file, with the tensors that the index puts there (None = all that it holds)."""
        index = self.path / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} must hold a weight_map; got none. Download the model again")
            for file in sorted(set(weight_map.values())):
                yield self.path / file, {name for name, held_by in weight_map.items() if held_by == file}
        elif (self.path / SINGLE).is_file():
            yield self.path / SINGLE, None
        else:
            pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(suffix))
            raise ValueError(
                f"init_from must be a folder with {SINGLE} or {INDEX}; got {self.path} with "
                + (f"{', '.join(pickles[:3])}. Pickles are not read: convert them" if pickles else "neither. Save it")
                + " with transformers: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(OTHER_PATH)"
            )

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise ValueError(f"{self.path} must hold the shard {file.name} that its index names; it is missing")
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{file} must be a whole safetensors file; {error}. Download it again") from error
        return self._open[file]

    def read(self, name: str) -> Tensor:
        header = self.headers[name]
        return self._handle(header.file).get_tensor(header.name)


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"init_from must be a folder with {file.name}; got {file.parent} without it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be JSON; {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(value).__name__}")
    return value


def load_tensors(checkpoint: Checkpoint, model: nn.Module, tensors: Tensors, gather: Gather | None = None) -> None:
    """Fill the model's parameters from a checkpoint, one at a time, so that no rank ever holds more than one whole.

    `gather` is entered with the parameter that is about to be filled, for the same parameters in the same order on
    every rank. Every name, shape and type is checked before the first is entered.
    """
    parameters: dict[str, Tensor] = dict(named_weights(model))
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in tensors.buffers}
    _check(checkpoint, parameters, tensors)
    for name, parameter in parameters.items():
        recipe = tensors.read[name]
        values = _entries(recipe, checkpoint, parameter) if recipe.stacked else [_value(recipe, checkpoint, parameter)]
        whole = gather([parameter]) if gather and isinstance(parameter, nn.Parameter) else nullcontext()
        with torch.no_grad(), whole:
            places = parameter if recipe.stacked else [parameter]
            for place, value in zip(places, values, strict=True):
                if place.shape != value.shape:
                    raise ValueError(f"{name} must have entries {tuple(place.shape)}; got {tuple(value.shape)}")
                place.copy_(value)


def _value(recipe: Recipe, checkpoint: Checkpoint, parameter: Tensor) -> Tensor:
    """A parameter's value; of one by expert, that of the experts that this rank holds."""
    value = recipe.make(*(checkpoint.read(source) for source in recipe.sources))
    cut: Cut | None = getattr(parameter, "cut", None)
    return value if cut is None else value[cut.held.start : cut.held.stop]


def _entries(recipe: Recipe, checkpoint: Checkpoint, parameter: Tensor) -> Iterator[Tensor]:
    """The entries of a parameter's first dim, one at a time: of one by expert, those that this rank holds."""
    cut: Cut | None = getattr(parameter, "cut", None)
    for entry in range(len(recipe.sources)) if cut is None else cut.held:
        yield recipe.make(checkpoint.read(recipe.sources[entry]))


def _check(checkpoint: Checkpoint, parameters: Mapping[str, Tensor], tensors: Tensors) -> None:
    headers, problems = checkpoint.headers, []
    if unlike := set(parameters) ^ set(tensors.read):
        raise ValueError(
            f"the model must have the parameters that {checkpoint.path}/config.json describes; they differ in "
            f"{_listed(unlike)}. Leave the model's settings to init_from"
        )
    needed = {source for recipe in tensors.read.values() for source in recipe.sources}
    if missing := needed - set(headers):
        problems.append(f"missing: {_listed(missing)}")
    unused = set(headers) - needed - set(tensors.duplicates)
    surplus = {name for name in unused if not any(re.search(pattern, name) for pattern in tensors.ignored)}
    if surplus:
        problems.append(f"unexpected: {_listed(surplus)}")
    for name in sorted(needed & set(headers)):
        if headers[name].dtype not in _FLOATS:
            problems.append(f"{name} of type {headers[name].dtype}, where only {', '.join(sorted(_FLOATS))} are read")
    for name, parameter in parameters.items():
        recipe = tensors.read[name]
        if all(source in headers for source in recipe.sources):
            problems += _wrong_shape(name, recipe, parameter, headers)
    if not problems:
        problems += _differing_duplicates(checkpoint, tensors)
    if problems:
        raise ValueError(f"{checkpoint.path} must hold the tensors of its config.json; got " + "; ".join(problems))


def _wrong_shape(name: str, recipe: Recipe, parameter: Tensor, headers: Mapping[str, Header]) -> list[str]:
    expected = tuple(shape_of(parameter))
    sources = [torch.empty(headers[source].shape, device="meta") for source in recipe.sources]
    try:
        got = tuple(recipe.whole(*sources).shape)
    except (RuntimeError, ValueError, IndexError):
        got = None
    if got == expected:
        return []
    shapes = _listed(f"{source} {list(headers[source].shape)}" for source in recipe.sources)
    return [f"{shapes} for {name} {list(expected)}"]


def _differing_duplicates(checkpoint: Checkpoint, tensors: Tensors) -> list[str]:
    headers, problems = checkpoint.headers, []
    for copy, original in tensors.duplicates.items():
        if copy not in headers:
            continue
        alike = headers[copy][2:] == headers[original][2:]
        if not alike or not torch.equal(checkpoint.read(copy), checkpoint.read(original)):
            problems.append(f"{copy} unlike {original}, though config.json ties them")
    return problems


def save_tensors(
    state: Iterable[tuple[str, Tensor]],
    tensors: Tensors,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> torch.dtype:
    """Write our named parameters as their tensors, in files of at most `shard_bytes` (one tensor may exceed it).

    `state` is taken one tensor at a time; at most one shard is held. Returns the type of the written tensors (the
    first one's). Raises ValueError for names that do not fit.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1; got {shard_bytes}")
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, int] = {}
    size = total = count = parameters = 0
    kept: torch.dtype | None = None
    for name, tensor in _made(state, tensors):
        exact = tensors.buffers.issuperset(tensors.write[name].sources)  # those of routers, which keep their type
        tensor = tensor.detach().to(device="cpu", dtype=tensor.dtype if exact else dtype or tensor.dtype).contiguous()
        kept = kept or tensor.dtype
        if shard and size + tensor.nbytes > shard_bytes:
            save_file(shard, folder / _part(count), metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1
        # What was cut out of a larger tensor is copied, since safetensors refuses views that share their memory.
        shard[name] = tensor.clone() if tensor.nbytes < tensor.untyped_storage().nbytes() else tensor
        weight_map[name] = count
        size, total, parameters = size + tensor.nbytes, total + tensor.nbytes, parameters + tensor.numel()
    save_file(shard, folder / _part(count), metadata={"format": "pt"})
    _name_shards(folder, weight_map, count + 1, {"total_parameters": parameters, "total_size": total})
    return kept or torch.get_default_dtype()


def _name_shards(folder: Path, weight_map: dict[str, int], count: int, metadata: dict[str, int]) -> None:
    """Shards get their names when their number is known; a single one is no shard and has no index."""
    if count == 1:
        (folder / _part(0)).rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(names):
        (folder / _part(i)).rename(folder / file)
    placed = {name: names[i] for name, i in sorted(weight_map.items())}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": placed})


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _made(state: Iterable[tuple[str, Tensor]], tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, each as soon as all of ours that it is made of have come by."""
    users: dict[str, list[str]] = {}
    for theirs, recipe in tensors.write.items():
        for source in recipe.sources:
            users.setdefault(source, []).append(theirs)
    waiting: dict[str, dict[str, Tensor]] = {theirs: {} for theirs in tensors.write}
    for name, tensor in state:
        if name.startswith(tensors.left_out):
            continue
        if name in tensors.fixed:
            _check_fixed(name, tensor, tensors.fixed[name])
            continue
        if name not in users:
            raise ValueError(f"the model's parameters must be those of its settings; got {name}")
        for theirs in users.pop(name):
            held = waiting[theirs]
            held[name] = tensor
            recipe = tensors.write[theirs]
            if len(held) == len(set(recipe.sources)):
                del waiting[theirs]
                yield theirs, recipe.make(*(held[source] for source in recipe.sources))
    if waiting:
        raise ValueError(f"the model's parameters must be those of its settings; missing: {_listed(set(users))}")


def _check_fixed(name: str, tensor: Tensor, value: float | None) -> None:
    if value is not None and bool((tensor != value).any()):
        raise ValueError(
            f"{name} must be {value:g}, since models of this family have no such tensor; got other values. Choose a "
            "family that has it, or train with feed_forward.bias_rate=0"
        )


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name when the block ends well, and goes when it does not."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path must be a new or empty folder; got {path}. Choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted write may have left
    folder.mkdir()
    try:
        yield folder
        folder.replace(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _listed(names: Iterable[str], most: int = 6) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
