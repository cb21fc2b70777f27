"""The table of all mixers: `python tests/models/mixer_table.py` writes docs/mixers.md and docs/mixers.json.

A row is read from the mixer's docstring and YAML and from the ops that it calls on tensors without data. What has to be
measured is kept in the JSON: the worst error of each comparison in the definition tests, which run for it unless
LONGREACH_ORACLE_NOTES names what an earlier run of theirs noted, and whether the mixer does what the ticks say, tried
here at small sizes. With names of mixers only these are measured again.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from hydra.utils import instantiate
from mixer_ticks import TICKS
from model_presets import CONF, MIXERS, SOURCES, source_of
from omegaconf import OmegaConf
from oracles import NOTES
from torch import Tensor

from longreach.kernels import operation
from longreach.kernels.documents import Documents
from longreach.models import hf, mixers
from longreach.models.hf.components import Node
from longreach.models.hf.config import ConfigWriter
from longreach.models.mixer import Mixer, construct
from longreach.models.part import Part
from longreach.parallel import ops
from longreach.parallel.layout import Layout
from longreach.parallel.operation import Operation
from longreach.parallel.ops.sparse import BlockSelection
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategies.attention import SharedAttention
from longreach.parallel.strategies.halo import Halo
from longreach.parallel.strategies.listed_blocks import ListedAttention
from longreach.parallel.strategies.replicated import ReplicatedAttention
from longreach.parallel.strategies.serial import SerialPassing
from longreach.parallel.strategies.state_passing import StatePassing
from longreach.parallel.strategies.windows import GatherWindows, LocalWindows, WindowMeans
from longreach.parallel.strategy import Strategy

ROOT = Path(__file__).resolve().parents[2]
PAGE, MEASURED = ROOT / "docs" / "mixers.md", ROOT / "docs" / "mixers.json"
COMMAND = "python tests/models/mixer_table.py"
WIDTH, LENGTH = 2048, 4096  # of the model and the row for which sizes are given
FAR = 2**24 - 1  # a length at which a block of keys is all but full
COLUMNS = ("mixer", "equation", "ops", "state", "in bytes", "a rank sends", "oracle: worst error")


# What a mixer says of itself.


@dataclass(frozen=True)
class Described:
    """A mixer by the name of its YAML."""

    name: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return OmegaConf.to_container(OmegaConf.load(CONF / "mixer" / f"{self.name}.yaml"))  # type: ignore[return-value]

    @cached_property
    def made(self) -> Mixer:
        """With the settings of the YAML, in a model of width 2,048; its parameters have no data."""
        part = instantiate(self.settings, _convert_="all")
        with torch.device("meta"):
            made = construct(part, self.name, width=WIDTH, layer=1, depth=4, norm_eps=1e-6).to(torch.bfloat16)
        assert isinstance(made, Mixer)
        return made

    @property
    def source(self) -> Part | None:
        """The part that publishes what the mixer reads, with the settings of its YAML."""
        if self.name not in SOURCES:
            return None
        source, more = SOURCES[self.name]
        part = instantiate({**Described(source).settings, **more}, _convert_="all")
        with torch.device("meta"):
            return source_of(self.name, self.made, part, WIDTH).to(torch.bfloat16)

    @property
    def family(self) -> str:
        """The folder of its module."""
        package, _, rest = type(self.made).__module__.partition(f"{mixers.__name__}.")
        return rest.partition(".")[0] if not package else "elsewhere"

    @cached_property
    def texts(self) -> list[str]:
        """What describes it, the nearest first: the comment that heads its YAML, and the docstrings of its classes."""
        lines = (CONF / "mixer" / f"{self.name}.yaml").read_text().splitlines()
        heading = [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
        classes = [each for each in type(self.made).__mro__ if issubclass(each, Mixer) and each is not Mixer]
        return ["\n".join(heading), *(inspect.getdoc(each) or "" for each in classes)]

    @property
    def paper(self) -> str:
        """The first brackets of a first paragraph that hold a paper."""
        for text in self.texts:
            summary = " ".join(text.partition("\n\n")[0].split())
            if found := re.search(r"\(([^()]*arXiv[^()]*|[^()]*\b(?:19|20)\d\d\b[^()]*)\)", summary):
                link = r"[arXiv \1](https://arxiv.org/abs/\1)"
                return re.sub(r"(?:arXiv )?(\d{4}\.\d{4,5})", link, found[1])
        return "—"

    @property
    def equation(self) -> str:
        """The first line in which a state, or else anything, follows from itself a token before; else the first one."""
        for text in self.texts:
            lines = [line.strip() for line in text.splitlines() if re.search(r"\s=\s", line)]
            for step in (r"\b([Sh])_t = .*\b\1_[({]t ?[-−] ?1", r"\b(\w+)_t = .*\b\1_[({]t ?[-−] ?1", ""):
                if found := [line for line in lines if re.search(step, line)]:
                    parts = [part.strip() for part in re.split(r"\s{3,}", found[0]) if re.search(" = (?!0 …)", part)]
                    return "<br>".join(f"`{part}`".replace("|", r"\|") for part in parts)
        return "—"

    @property
    def imported(self) -> bool:
        """Whether a family of Hugging Face's checkpoints has layers that are this mixer."""
        node = Node.of(self.settings, width=WIDTH)
        for family in hf.known_families().values():
            for component in family.mixers.values():
                writer = ConfigWriter()
                if component.target is node.target:
                    component.write(writer, "mixer", node)
                    if not writer.problems:
                        return True
        return False


# What it does to tensors without data.


class Call(NamedTuple):
    """An operation that a mixer runs on ranks, and its inputs; None for keys that are kept for other layers.

    of_others: whether the keys are those that another layer keeps.
    """

    op: Operation | None
    inputs: tuple[Tensor | None, ...]
    of_others: bool = False


@torch.no_grad()
def calls_of(
    mixer: Mixer, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16, source: Part | None = None
) -> tuple[list[str], list[Call]]:
    """The functions of `parallel.ops` that the mixer calls, by name, and the operations that these run on two ranks.

    source: the part that publishes what the mixer reads; by default that is the input itself.
    """
    names: dict[str, None] = {}
    calls: list[Call] = []
    of_others = [False]
    run = operation.run

    def noted(name: str, function: Any) -> Any:
        @wraps(function)
        def noting(*inputs: Any, **more: Any) -> Any:
            names[name] = None
            of_others[0] = more.get("keys_of") is not None
            if name == "keep_keys":
                calls.append(Call(None, inputs))
            return function(*inputs, **more)

        return noting

    def rehearsed(op: Any, inputs: Any, where: Any, **more: Any) -> Any:
        if isinstance(getattr(op, "op", None), Operation):
            calls.append(Call(op.op, tuple(inputs), of_others[0]))
        return run(op, inputs, where, **more)

    seq = Sequence.rehearsal(Documents.whole(1, LENGTH), Layout(LENGTH, 2), Strategy())
    x = torch.empty(1, LENGTH // 2, width, device="meta", dtype=dtype)
    read = [x for _ in mixer.reads] if source is None else source(x, seq)[1:]
    with ExitStack() as stack:
        stack.enter_context(patch.object(operation, "run", rehearsed))
        for name in ops.__all__:
            stack.enter_context(patch.object(ops, name, noted(name, getattr(ops, name))))
        mixer(x, seq, *read)
    return list(names), calls


class Kept(NamedTuple):
    """What decoding keeps of the tokens so far for an operation, and what a rank sends for it in forward."""

    state: str = ""
    fixed: int = 0  # bytes
    per_token: float = 0.0  # bytes
    sent: str = ""


def kept_by(call: Call) -> Kept:
    """Of one sequence, with inputs as they are: bytes of the states in their type, and of tokens in theirs."""
    op, (first, *_) = call.op, (x for x in call.inputs if x is not None)
    of_token = first[0, 0].numel() * first.element_size()
    if op is None:
        return Kept(f"keys and values {shape_text(first.shape[2:])} a token", 0, 2 * of_token)
    if isinstance(op, StatePassing | SerialPassing):
        inner, inputs = op.op, op.op.record(*call.inputs)
        state, transition = (letters.removeprefix("B ") for letters in (inner.state, inner.transition_dims(inputs)))
        sizes = shape_text(inner.empty_results(call.inputs)[1].shape[1:])
        sent = (
            f"`{state}`, `{transition}`" if isinstance(op, StatePassing) else f"`{state}` to the next rank, which waits"
        )
        return Kept(f"`{state}` = {sizes}", inner.state_bytes(call.inputs), 0, sent)
    if isinstance(op, Halo):
        text = f"{op.width} token{'s' if op.width > 1 else ''} of {first.shape[2]:,}"
        return Kept(text, op.width * of_token, 0, text)
    if isinstance(op, ReplicatedAttention):
        return Kept()  # of summaries, which are kept and sent where they are made
    if isinstance(op, SharedAttention):
        travelling = op.op.sent(op.op.record(*call.inputs))
        size = sum(x[0, 0].numel() * x.element_size() for x in travelling)
        tokens = sum(stop - start for start, stop in op.op.kept(FAR))
        names = ", ".join(
            f"{name} {shape_text(x.shape[2:])}" for name, x in zip(op.op.travels, travelling, strict=True)
        )
        sent = f"{'listed ' if isinstance(op, ListedAttention) else ''}{names}"
        if op.until is not None or call.of_others:  # of keys that another op keeps
            return Kept(sent=f"{sent} a token")
        if tokens >= FAR:
            return Kept(f"{names} a token", 0, size, f"{sent} a token")
        return Kept(f"{names} of {tokens:,} tokens", tokens * size, 0, f"{sent} of up to {tokens:,} tokens")
    if isinstance(op, WindowMeans | GatherWindows):
        one = f"{shape_text(first.shape[2:])} a window of {op.size}, every {op.stride}"
        return Kept(one, 0, of_token / op.stride, one)
    if isinstance(op, LocalWindows):
        text = f"{op.size - 1} tokens of {shape_text(first.shape[2:])}"
        return Kept(text, (op.size - 1) * of_token, 0, text)
    if isinstance(op, BlockSelection):
        return Kept()  # by summaries that every rank has
    return Kept(sent=(inspect.getdoc(op) or type(op).__name__).partition("\n")[0])


def shape_text(shape: Any) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def bytes_text(kept: list[Kept]) -> str:
    fixed, per_token = sum(each.fixed for each in kept), sum(each.per_token for each in kept)
    told = [f"{fixed / 1024:,.0f} KiB"] if fixed else []
    told += [f"{per_token:,.0f} bytes a token"] if per_token else []
    return " + ".join(told) + ("" if per_token else ", constant") if told else "none"


# What is measured.


def worst_errors() -> dict[str, dict[str, float]]:
    """The worst error of each mixer against each oracle, from the definition tests or the notes that they left."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(os.environ.get(NOTES, f"{folder}/notes"))
        if NOTES not in os.environ:
            tests = sorted(map(str, Path(__file__).parent.glob("test_mixer_definitions*.py")))
            environment = {**os.environ, NOTES: str(notes)}
            subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment, check=True)
        found: dict[str, dict[str, float]] = {}
        for line in map(json.loads, notes.read_text().splitlines()):
            of_mixer = found.setdefault(line["mixer"], {})
            of_mixer[line["oracle"]] = max(line["error"], of_mixer.get(line["oracle"], 0.0))
    return found


def measure(names: list[str]) -> None:
    """Writes what is measured of these mixers; the rest stays as it is."""
    errors, known = worst_errors(), measured()
    for name in names:
        ticks, noted = [tick for tick in TICKS if ticked(name, tick)], errors.get(name, {})
        known[name] = {"ticks": ticks, "errors": {oracle: float(f"{noted[oracle]:.1e}") for oracle in sorted(noted)}}
        print(
            f"{name}: {' · '.join(ticks)}; {', '.join(noted) or 'no definition test, or none that runs here'}",
            flush=True,
        )
        MEASURED.write_text(json.dumps({name: known[name] for name in MIXERS if name in known}, indent=1) + "\n")


def ticked(name: str, tick: str) -> bool:
    try:
        return TICKS[tick](name)
    except Exception as error:
        print(f"{name}, {tick}: {error!r}", flush=True)
        return False


def measured() -> dict[str, Any]:
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


# The page.


def row(name: str, found: dict[str, Any]) -> str:
    """The row of a mixer, given what was measured of it."""
    mixer = Described(name)
    called, calls = calls_of(mixer.made, source=mixer.source)
    kept = [kept_by(call) for call in calls]
    states, sent = (dict.fromkeys(filter(None, texts)) for texts in ([x.state for x in kept], [x.sent for x in kept]))
    errors = [f"{oracle}: {error:.0e}" for oracle, error in found.get("errors", {}).items()]
    ticks = [tick in found.get("ticks", ()) for tick in TICKS] + [mixer.imported]
    cells = [
        f"**{name}**<br>{mixer.paper}", mixer.equation, "<br>".join(f"`{each}`" for each in called),
        "<br>".join(states), bytes_text(kept), "<br>".join(sent), "<br>".join(errors) or "—",
        *("✓" if tick else "" for tick in ticks),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def title(family: str) -> str:
    return family.replace("_", " ").capitalize()


def page(rows: dict[str, str], families: dict[str, str]) -> str:
    """The page, given the row and the family of each mixer."""
    columns = [*COLUMNS, *TICKS, "Hugging Face"]
    lines = [INTRODUCTION]
    for family in sorted(set(families.values())):
        lines += [f"## {title(family)}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [*(rows[name] for name in sorted(rows) if families[name] == family), ""]
    return "\n".join(lines)


INTRODUCTION = f"""# The mixers

One row per file in `conf/mixer/`. Made by `{COMMAND}`; nothing is typed by hand. Sizes are those of one layer with the
settings of that file in a model of width {WIDTH:,}, in bfloat16 with states in float32.

* **State**: what decoding keeps of the tokens so far. This is the op's state (H heads, K key dim, V value dim, D
  channels, N states of a channel), the last tokens before a convolution or shift, and keys and values. Its bytes do not
  depend on the number of tokens, unless the next column counts bytes a token.
* **A rank sends** this in forward, for each of its spans, to the other ranks of a row: a state and its transition (what
  the span's tokens do to the state that enters), the last tokens, or keys and values.
  [communication.md](communication.md) has the bytes of every strategy.
* **Oracle**: what the definition tests compare the mixer with, and the worst relative error of outputs and gradients.
* **Ticks** are tried at small sizes. Trains: the input and every parameter get a gradient. Packed: documents of a row
  give what each gives alone. Ranks: three ranks give the output and gradient of one. Decodes: token by token gives what
  the whole row gives. (These in float64, to 1e-9.) Triton: its kernels, under the interpreter, agree with PyTorch to
  1e-3. Hugging Face: a family of its checkpoints has such layers.
* **Not here**: cross attention to a memory `[B, M, width]` of its own length, as of an encoder. The rows of a run
  hold tokens alone; `cross_attention` reads hidden states of an earlier layer, one for each token of the row.
"""


def rows_of_today(found: dict[str, Any], names: list[str] = MIXERS) -> dict[str, str]:
    return {name: row(name, found.get(name, {})) for name in names}


def main() -> None:
    if not os.environ.get("TRITON_INTERPRET"):  # it counts when Triton is imported, which has happened
        raise SystemExit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, "TRITON_INTERPRET": "1"}))
    torch.set_num_threads(1)
    measure(sys.argv[1:] or MIXERS)
    families = {name: Described(name).family for name in MIXERS}
    PAGE.write_text(page(rows_of_today(measured()), families))
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
