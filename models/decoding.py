"""Generation: a prompt is read once, then one token a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..parallel.mesh import Experts
from ..parallel.sequence import DecodingCache, Sequence
from .language_model import LanguageModel


def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    known: Collection[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    experts: Experts | None = None,
) -> Iterator[int]:
    """Yields new token ids as they are drawn, at most `max_new_tokens`, ending before the first id of `stop`.

    temperature: divides the logits; 0 takes the likeliest token. top_p: draws from the smallest set of tokens that
    has at least this probability (nucleus sampling, Holtzman et al., 2020, arXiv 1904.09751). known: the only ids that
    are drawn, by default all: an embedding can have more rows than its tokenizer has tokens. The draw depends on `seed`
    alone; it is made on the CPU. experts: the ranks that share out the model's experts, all of which call it alike.
    Raises ValueError for settings out of range, at the call.
    """
    if not prompt_ids:
        raise ValueError("prompt must have at least one token; got none. Begin with the end-of-text token")
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.vocabulary:
        raise ValueError(f"prompt must hold ids in 0..{model.vocabulary - 1}; got {min(prompt_ids)}..{max(prompt_ids)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative; got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative; got {temperature}. 0 is greedy")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    if temperature == 0 and top_p != 1:
        raise ValueError(f"top_p must be 1 at temperature 0, where it has no effect; got {top_p}")
    drawn = [token for token in range(model.vocabulary) if known is None or token in known]
    if not drawn:
        raise ValueError(f"known must hold ids in 0..{model.vocabulary - 1}; got none of them. Leave it out for all")
    device = torch.device(device)
    unknown = torch.ones(model.vocabulary, dtype=torch.bool, device=device)
    unknown[torch.tensor(drawn, device=device)] = False
    return _tokens(
        model, prompt_ids, max_new_tokens, temperature, top_p, frozenset(stop), unknown, seed, device, experts
    )


def _tokens(
    model: LanguageModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: frozenset[int],
    unknown: Tensor,
    seed: int,
    device: torch.device,
    experts: Experts | None,
) -> Iterator[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    cache = DecodingCache()
    unread = prompt_ids
    for _ in range(max_new_tokens):
        logits = next_logits(model, torch.tensor([unread], device=device), cache, experts)[0]
        logits = logits.masked_fill(unknown, -math.inf)
        token = _draw(logits, temperature, top_p, generator)
        if token in stop:
            return
        yield token
        unread = [token]


@torch.no_grad()
def next_logits(model: LanguageModel, tokens: Tensor, cache: DecodingCache, experts: Experts | None = None) -> Tensor:
    """Logits `[B, Vocab]` after `tokens` int64 `[B, T]`, which follow those that the cache has seen; advances it."""
    seq = Sequence.decoding(cache, tokens.shape[0], tokens.shape[1], experts=experts)
    with torch.compiler.set_stance("force_eager"):  # graphs are of the shapes of training, and see no cache
        hidden = model.hidden(tokens, seq, last=True)
    cache.advance(tokens.shape[1])
    return model.head(hidden[:, -1])


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        kept = ordered.cumsum(0) - ordered < top_p  # a token stays while those before it fall short of top_p
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered * kept)
    return int(torch.multinomial(probabilities, 1, generator=generator))
