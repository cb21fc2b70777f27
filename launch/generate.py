"""python -m longreach.launch.generate checkpoint=PATH prompt="..." — text from a checkpoint, as it is drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from ..models.activations.recomputation import SETTINGS as MEMORY
from ..models.decoding import continue_all
from ..models.language_model import LanguageModel
from ..trainer.checkpoint import checkpoint
from ..trainer.checkpoint.choice import locate, read_config
from ..trainer.data.tokenizers import Tokenizer, checkpoint_tokenizer
from ..trainer.settings import home
from . import configuration
from .build import build


@dataclass
class GenerationSettings:
    """`checkpoint` is a checkpoint, or a run's folder, of which the newest is taken."""

    checkpoint: str | None = None  # a checkpoint, or a run, of which the newest is taken
    prompt: str = ""  # what the model continues
    prompts: str | None = None  # in place of prompt, a file with one in every line
    max_new_tokens: int = 256  # at most; the end of a document ends earlier
    max_length: int | None = None  # of prompt and new tokens together
    batch_size: int = 8  # prompts at once, each of whatever length
    prefill_tokens: int | None = 4096  # of a prompt that are read at a time; null reads it at once
    temperature: float = 0.8  # 0 takes the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together
    stop: list[str] = field(default_factory=list)  # texts at which to end; the end of a document always ends
    seed: int = 0  # of what is drawn
    device: str = "auto"  # or cpu, cuda


configuration.register("generation", GenerationSettings)


def generate(settings: GenerationSettings) -> None:
    """Prints the prompt and what the model adds, piece by piece. Raises ValueError for what cannot be."""
    if not settings.checkpoint:
        raise ValueError("checkpoint must be given; got none. Name a run or a checkpoint: checkpoint=runs/NAME/TIME")
    texts = _prompts(settings)
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {settings.batch_size}")
    if any(not text for text in settings.stop):
        raise ValueError("stop must be texts that are not empty; got an empty one. Remove it")
    device = device_of(settings.device)
    model, tokenizer = load(locate(home(settings.checkpoint, "checkpoint"), "checkpoint"), device)
    prompts = [prompt_ids(tokenizer, text, model.vocabulary) for text in texts]
    most = max(map(len, prompts)) + settings.max_new_tokens if settings.max_length is None else settings.max_length
    if settings.max_length is not None and max(map(len, prompts)) >= most:
        raise ValueError(f"max_length must exceed every prompt; got {most} for one of {max(map(len, prompts))} tokens")
    for first in range(0, len(texts), settings.batch_size):
        some = slice(first, first + settings.batch_size)
        for text in _texts(model, tokenizer, texts[some], prompts[some], settings, most, settings.seed + first, device):
            sys.stdout.write(text)
            sys.stdout.flush()


def _prompts(settings: GenerationSettings) -> list[str]:
    """The texts to continue. Raises ValueError where there are none, or in two places."""
    if settings.prompts is not None:
        if settings.prompt:
            raise ValueError("prompt must be left out where prompts names a file; got both")
        file = Path(home(settings.prompts, "prompts"))
        if not file.is_file():
            raise ValueError(f"prompts must name a file with a prompt in every line; got {settings.prompts}")
        texts = [line for line in file.read_text().splitlines() if line]
    else:
        texts = [settings.prompt] if settings.prompt else []
    if not texts:
        raise ValueError('prompt must be a text for the model to continue; got none. Give prompt="..."')
    return texts


def _texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: list[str],
    prompts: list[list[int]],
    settings: GenerationSettings,
    most: int,
    seed: int,
    device: torch.device,
) -> Iterator[str]:
    """What is written of some prompts that are continued together: of one as it is drawn, of several at the end."""
    ids: list[list[int]] = [[] for _ in prompts]
    before = [tokenizer.encode(text)[-8:] for text in texts]

    def ends(row: int, token: int) -> bool:
        ids[row].append(token)
        added = tokenizer.decode(before[row] + ids[row]) if settings.stop and len(texts) > 1 else ""
        full = len(prompts[row]) + len(ids[row]) >= most
        return full or any(stop in added[len(tokenizer.decode(before[row])) :] for stop in settings.stop)

    rows = continue_all(
        model, prompts, max_new_tokens=min(settings.max_new_tokens, most - min(map(len, prompts))),
        temperature=settings.temperature, top_p=settings.top_p, stop=(tokenizer.end_of_text,), ends=ends,
        known=tokenizer.ids(), seed=seed, prefill_tokens=settings.prefill_tokens, device=device,
    )  # fmt: skip
    if len(texts) == 1:
        yield texts[0]
        yield from until(
            text_pieces(tokenizer, texts[0], (token for (token,) in rows if token is not None)), settings.stop
        )
        yield "\n"
        return
    for _ in rows:
        pass
    for text, added in zip(texts, ids, strict=True):
        yield text + "".join(until(text_pieces(tokenizer, text, added), settings.stop)) + "\n"


def load(path: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer of a checkpoint, from its folder alone."""
    checkpoint.verify(path)
    tokenizer = checkpoint_tokenizer(path)
    model_settings = {name: value for name, value in read_config(path)["model"].items() if name not in MEMORY}
    with device:
        model = build(model_settings)
    model.at_step(checkpoint.load_weights(path, model)["step"])
    return model.eval(), tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str, rows: int) -> list[int]:
    """The ids of a prompt, begun as documents are. Raises ValueError for a token beyond the embedding's `rows`."""
    ids = tokenizer.encode_prompt(text)
    if max(ids, default=0) >= rows:
        raise ValueError(
            f"prompt must have tokens that the model has; got {tokenizer.describe(max(ids))} with an embedding of "
            f"{rows} rows. Leave it out of the prompt"
        )
    return ids


def text_pieces(tokenizer: Tokenizer, prompt: str, ids: Iterable[int]) -> Iterator[str]:
    """The text that each id adds; a character whose bytes are not all there yet waits for the next id."""
    before = tokenizer.encode(prompt)[-8:]  # some tokenizers write a word's space only after another word
    shown, pending = tokenizer.decode(before), list(before)
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            pending = pending[-8:]
            shown = tokenizer.decode(pending)
    rest = tokenizer.decode(pending)[len(shown) :]
    if rest:
        yield rest


def until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """The pieces up to the first of the texts in `stops`, which may span several; what could begin one is held back."""
    pending = ""
    for piece in pieces:
        pending += piece
        ends = [at for stop in stops if (at := pending.find(stop)) >= 0]
        if ends:
            yield pending[: min(ends)]
            return
        keep = max((n for stop in stops for n in range(len(stop)) if pending.endswith(stop[:n])), default=0)
        yield pending[: len(pending) - keep]
        pending = pending[len(pending) - keep :]
    yield pending


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu on a machine without CUDA; got cuda")
    return torch.device(name)


def main() -> None:
    configuration.run_once()
    configuration.quiet_libraries()

    @hydra.main(version_base="1.3", config_path=configuration.CONFIGURATIONS, config_name="generate")
    def compose(config: DictConfig) -> None:
        try:
            generate(configuration.to_schema(config, GenerationSettings))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print()
            sys.exit(130)

    configuration.run_main(compose, "generate", configuration.texts_of(GenerationSettings))


if __name__ == "__main__":
    main()
