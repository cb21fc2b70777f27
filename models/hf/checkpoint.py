"""The files of a Hugging Face model, read: safetensors in one file or in shards with an index, and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..part import Cut, named_weights, shape_of
from .tensors import Entries, Recipe, Tensors
from .writing import INDEX, SINGLE, listed

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder
)
CONFIG = "config.json"
GENERATION = "generation_config.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_MOST_OPEN = 2  # files
_AGAIN = "Download the model again, or have it written again"

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
                    f"{self.path / INDEX} must name tensors that {file.name} holds; got {listed(names - held)}. "
                    f"{_AGAIN}"
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
            if not isinstance(weight_map, dict) or not weight_map or {type(x) for x in weight_map.values()} != {str}:
                raise ValueError(f"{index} must hold a weight_map, of a file to each tensor; got none. {_AGAIN}")
            for file in sorted(set(weight_map.values())):
                yield self.path / file, {name for name, held_by in weight_map.items() if held_by == file}
        elif (self.path / SINGLE).is_file():
            yield self.path / SINGLE, None
        else:
            raise ValueError(f"{self.path} must hold {SINGLE} or {INDEX}; got {self._instead()}")

    def _instead(self) -> str:
        """What is there in place of weights, and what to do about it."""
        if shards := sorted(file.name for file in self.path.glob("*.safetensors")):
            return f"{listed(shards, 3)} without an index. {_AGAIN}"
        pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(suffix))
        return (
            f"it with {listed(pickles, 3)}. Pickles are not read: convert them" if pickles else "neither. Save it"
        ) + " with transformers: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(OTHER_PATH)"

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise ValueError(
                    f"{self.path} must hold the shard {file.name} that its index names; it is missing. {_AGAIN}"
                )
            if len(self._open) == _MOST_OPEN:  # what was read of an open file counts as memory of the process
                del self._open[next(iter(self._open))]
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} must be a whole safetensors file; {error}. {_AGAIN}") from error
        return self._open[file]

    def read(self, name: str) -> Tensor:
        header = self.headers[name]
        try:
            return self._handle(header.file).get_tensor(header.name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{header.file} must hold {header.name} whole; {error}. {_AGAIN}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"a model's folder must be one with {file.name}; got {file.parent} without it. Check the path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON; {error}. {_AGAIN}") from error
    except OSError as error:
        raise ValueError(f"{file} must be a file that can be read; {error}. Check its permissions") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(value).__name__}. {_AGAIN}")
    return value


class Weights:
    """The tensors of a checkpoint as parameters and buffers of the model that its config.json describes.

    Raises one ValueError that names every tensor that is missing or unexpected, and with its file every one that has
    another shape than config.json says, or a type that is not read. Nothing but headers is read for that.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Tensors) -> None:
        self.checkpoint, self.tensors = checkpoint, tensors
        self.path, self.shapes = checkpoint.path, tensors.shapes
        if problems := self._problems() or self._differing_duplicates():
            raise ValueError(
                f"{self.path} must hold the tensors of its config.json; got {'; '.join(problems)}. Correct config.json "
                "where it is of another model, or download the model again"
            )

    def read(self, name: str) -> Tensor | Entries:
        """The parameter or buffer of this name, in the type of the checkpoint."""
        recipe = self.tensors.read[name]
        if recipe.stacked:
            return Entries(len(recipe.sources), lambda entry: recipe.make(self.checkpoint.read(recipe.sources[entry])))
        return recipe.make(*(self.checkpoint.read(source) for source in recipe.sources))

    def _problems(self) -> list[str]:
        headers, tensors, problems = self.checkpoint.headers, self.tensors, []
        needed = {source for recipe in tensors.read.values() for source in recipe.sources}
        if missing := needed - set(headers):
            problems.append(f"missing: {listed(missing)}")
        unused = set(headers) - needed - set(tensors.duplicates)
        surplus = {name for name in unused if not any(re.search(pattern, name) for pattern in tensors.ignored)}
        if surplus:
            problems.append(f"unexpected: {listed(surplus)}")
        if others := [name for name in sorted(needed & set(headers)) if headers[name].dtype not in _FLOATS]:
            first = headers[others[0]]
            problems.append(
                f"{listed(others, 3)} of type {first.dtype} in {first.file.name}, where only "
                f"{', '.join(sorted(_FLOATS))} are read: save the model dequantised"
            )
        present = {name: recipe for name, recipe in tensors.read.items() if set(recipe.sources) <= headers.keys()}
        wrong = [text for name, recipe in present.items() for text in self._wrong_shape(recipe, self.shapes[name])]
        wrong = list(dict.fromkeys(wrong))
        return problems + wrong[:3] + ([f"{len(wrong) - 3} more of other shapes"] if len(wrong) > 3 else [])

    def _wrong_shape(self, recipe: Recipe, shape: torch.Size) -> list[str]:
        """What is wrong with the tensors that a parameter of this shape is made of."""
        headers = self.checkpoint.headers
        try:
            if recipe.whole(*(_like(headers[source].shape) for source in recipe.sources)).shape == shape:
                return []
        except (RuntimeError, ValueError, IndexError):
            pass
        expected = {source: self._their_shapes.get(source, tuple(shape)) for source in recipe.sources}
        wrong = [source for source in recipe.sources if headers[source].shape != expected[source]] or recipe.sources
        shapes = [(name, headers[name].file.name, list(headers[name].shape), list(expected[name])) for name in wrong]
        return [f"{name} in {file} of shape {there} instead of {right}" for name, file, there, right in shapes]

    @cached_property
    def _their_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of their tensors, as we would write it."""
        ours = {name: _like(shape) for name, shape in self.shapes.items()}
        return {
            name: tuple(recipe.whole(*(ours[source] for source in recipe.sources)).shape)
            for name, recipe in self.tensors.write.items()
        }

    def _differing_duplicates(self) -> list[str]:
        headers, problems = self.checkpoint.headers, []
        for copy, original in self.tensors.duplicates.items():
            if copy not in headers:
                continue
            alike = headers[copy][2:] == headers[original][2:]
            if not alike or not torch.equal(self.checkpoint.read(copy), self.checkpoint.read(original)):
                problems.append(f"{copy} unlike {original}, though config.json ties them")
        return problems


def prepare(weights: Weights, model: nn.Module) -> Callable[[Gather | None], None]:
    """What fills the model's parameters, one at a time, so that no rank ever holds more than one whole.

    The call that it returns takes `gather`, which is entered with the parameter that is about to be filled, for the
    same parameters in the same order on every rank. Raises ValueError where the model has other parameters.
    """
    parameters: dict[str, Tensor] = dict(named_weights(model))
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in weights.tensors.buffers}
    unlike = set(parameters) ^ set(weights.shapes)
    unlike |= {name for name in set(parameters) - unlike if shape_of(parameters[name]) != weights.shapes[name]}
    if unlike:
        raise ValueError(
            f"the model must have the parameters that {weights.path / CONFIG} describes; they differ in "
            f"{listed(unlike)}. Leave the model's settings to init_from"
        )

    @torch.no_grad()
    def fill(gather: Gather | None) -> None:
        for name, parameter in parameters.items():
            value, cut = weights.read(name), getattr(parameter, "cut", None)
            whole = gather([parameter]) if gather and isinstance(parameter, nn.Parameter) else nullcontext()
            with whole:
                _fill(parameter, value, cut)

    return fill


def _fill(parameter: Tensor, value: Tensor | Entries, cut: Cut | None) -> None:
    """Of a parameter by expert, this rank takes the experts that it holds."""
    if isinstance(value, Entries):
        for place, entry in enumerate(range(value.count) if cut is None else cut.held):
            parameter[place].copy_(value[entry])
    else:
        parameter.copy_(value if cut is None else value[cut.held.start : cut.held.stop])


def _like(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")
