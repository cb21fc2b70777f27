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
from ..models.decoding import generate as draw
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
    max_new_tokens: int = 256  # at most; the end of a document ends earlier
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
    if not settings.prompt:
        raise ValueError('prompt must be a text for the model to continue; got none. Give prompt="..."')
    if any(not text for text in settings.stop):
        raise ValueError("stop must be texts that are not empty; got an empty one. Remove it")
    device = _device(settings.device)
    model, tokenizer = load(locate(home(settings.checkpoint, "checkpoint"), "checkpoint"), device)
    drawn = draw(
        model,
        prompt_ids(tokenizer, settings.prompt, model.vocabulary),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=(tokenizer.end_of_text,),
        known=tokenizer.ids(),
        seed=settings.seed,
        device=device,
    )
    sys.stdout.write(settings.prompt)
    for piece in until(text_pieces(tokenizer, settings.prompt, drawn), settings.stop):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


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


def _device(name: str) -> torch.device:
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
