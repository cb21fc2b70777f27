"""Decoding: prompts are read, several at once, at once or in pieces, by one rank or by several; then a token a step.

Rows of unequal length stand with padding before them (see `parallel.decoding_cache`), rather than to be read one by
one into one cache: so prompts are read in batches, all rows are at one column of the cache, which is written in one
place for all, and no op needs to know of it, since every op passes padding by and counts a row's own positions. What
it costs is what layers that treat each token by itself compute for padding: put prompts of like length together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Sequential

import torch
from torch import Tensor

from ..parallel.collectives import gathered, of_last
from ..parallel.layout import Layout
from ..parallel.mesh import Experts, Mesh
from ..parallel.sequence import DecodingCache, Sequence
from .language_model import LanguageModel
from .uncompiled import uncompiled


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
    prefill_tokens: int | None = None,
    device: torch.device | str = "cpu",
    experts: Experts | None = None,
    mesh: Mesh | None = None,
    together: bool = False,
) -> Iterator[int]:
    """Yields new token ids of one prompt as they are drawn, ending before the first id of `stop`.

    See `continue_all`. Raises ValueError for settings out of range, at the call.
    """
    rows = continue_all(
        model, [prompt_ids], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
        known=known, seed=seed, prefill_tokens=prefill_tokens, device=device, experts=experts, mesh=mesh,
        together=together,
    )  # fmt: skip
    return (token for (token,) in rows if token is not None)


def continue_all(
    model: LanguageModel,
    prompts: Sequential[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    ends: Callable[[int, int], bool] | None = None,
    known: Collection[int] | None = None,
    seed: int = 0,
    prefill_tokens: int | None = None,
    device: torch.device | str = "cpu",
    experts: Experts | None = None,
    mesh: Mesh | None = None,
    together: bool = False,
) -> Iterator[list[int | None]]:
    """Yields the next token id of each prompt, as they are drawn: at most `max_new_tokens` times, None for ended rows.

    A row ends before the first id of `stop`, or after an id of which `ends(row, id)` is True; all end with the last of
    them. Each gets what it would get alone.
    temperature: divides the logits; 0 takes the likeliest token. top_p: draws from the smallest set of tokens that
    has at least this probability (nucleus sampling, Holtzman et al., 2020, arXiv 1904.09751). known: the only ids that
    are drawn, by default all: an embedding can have more rows than its tokenizer has tokens. The draws of row r depend
    on `seed + r` alone; they are made on the CPU. prefill_tokens, experts, mesh: see `prefill`. together: all ranks of
    the mesh call the model equally often, until the rows of all of them have ended, as ranks that share out parameters
    (ZeRO-3) or experts must where they have other prompts than one another; all call it with the same
    `max_new_tokens`, and read to the end what it yields.
    Raises ValueError for settings out of range, at the call.
    """
    _check_steps(max_new_tokens, prefill_tokens, mesh, together)
    check_prompts(model, prompts, prefill_tokens, mesh)
    draw = _Draw(model, len(prompts), temperature, top_p, known, seed, torch.device(device), mesh)

    def tokens() -> Iterator[list[int | None]]:
        if not max_new_tokens:
            return
        logits, cache = prefill(
            model, prompts, room=max_new_tokens - 1, prefill_tokens=prefill_tokens, device=device, experts=experts,
            mesh=mesh,
        )  # fmt: skip
        new, ended = [0] * len(prompts), [False] * len(prompts)
        for number in range(max_new_tokens):
            if not all(ended):  # otherwise those of other ranks go on
                new = draw(logits)
                given = [None if over or token in stop else token for token, over in zip(new, ended, strict=True)]
                if any(token is not None for token in given):
                    yield given
                for row, token in enumerate(given):
                    if not ended[row] and (token is None or (ends is not None and ends(row, token))):
                        ended[row] = True
                        cache.end(row)
            if number + 1 == max_new_tokens or _all_ended(ended, mesh if together else None, device):
                return
            logits = next_logits(model, torch.tensor(new, device=device).unsqueeze(1), cache, experts)

    return tokens()


def _check_steps(max_new_tokens: int, prefill_tokens: int | None, mesh: Mesh | None, together: bool) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative; got {max_new_tokens}")
    if together and mesh is None:
        raise ValueError("mesh must be given with together, since it says which ranks there are; got none")
    if together and prefill_tokens is not None:
        raise ValueError(
            "prefill_tokens must be left out with together, since longer prompts would take more calls; got "
            f"{prefill_tokens}"
        )


def _all_ended(ended: Sequential[bool], mesh: Mesh | None, device: torch.device | str) -> bool:
    """Whether these rows have ended, and with a mesh those of all its ranks, which all call it."""
    if mesh is None or mesh.world_size == 1:
        return all(ended)
    mine = torch.tensor([all(ended)], dtype=torch.int32, device=device)
    return bool(gathered(mine, mesh.all_ranks, mesh.world_size).all())


class _Draw:
    """Draws a token for each row from logits `[B, Vocab]`; see `continue_all`."""

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        temperature: float,
        top_p: float,
        known: Collection[int] | None,
        seed: int,
        device: torch.device,
        mesh: Mesh | None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must not be negative; got {temperature}. 0 is greedy")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
        if temperature == 0 and top_p != 1:
            raise ValueError(f"top_p must be 1 at temperature 0, where it has no effect; got {top_p}")
        drawn = [token for token in range(model.vocabulary) if known is None or token in known]
        if not drawn:
            raise ValueError(
                f"known must hold ids in 0..{model.vocabulary - 1}; got none of them. Leave it out for all"
            )
        self.unknown = torch.ones(model.vocabulary, dtype=torch.bool, device=device)
        self.unknown[torch.tensor(drawn, device=device)] = False
        self.generators = [torch.Generator("cpu").manual_seed(seed + row) for row in range(rows)]
        self.temperature, self.top_p, self.mesh = temperature, top_p, mesh

    def __call__(self, logits: Tensor) -> list[int]:
        logits = logits.masked_fill(self.unknown, -math.inf)
        if self.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            rows = zip(logits, self.generators, strict=True)
            drawn = [_draw(row, self.temperature, self.top_p, generator) for row, generator in rows]
            chosen = torch.tensor(drawn, device=logits.device)
        if self.mesh is not None and self.mesh.sequence_group is not None:
            # Ranks that disagreed would wait for one another.
            chosen = gathered(chosen, self.mesh.sequence_group, self.mesh.sequence_ranks)[0]
        return chosen.tolist()


def check_prompts(
    model: LanguageModel, prompts: Sequential[list[int]], prefill_tokens: int | None, mesh: Mesh | None
) -> None:
    """Raises ValueError for prompts that the model cannot read, or not this way."""
    if not prompts:
        raise ValueError("prompts must be at least one; got none")
    for prompt in prompts:
        if not prompt:
            raise ValueError("prompt must have at least one token; got none. Begin with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= model.vocabulary:
            raise ValueError(f"prompt must hold ids in 0..{model.vocabulary - 1}; got {min(prompt)}..{max(prompt)}")
    if prefill_tokens is not None and prefill_tokens < 1:
        raise ValueError(f"prefill_tokens must be at least 1; got {prefill_tokens}. Leave it out for whole prompts")
    ranks = 1 if mesh is None else mesh.sequence_ranks
    if prefill_tokens is not None and ranks > 1:
        raise ValueError(
            f"prefill_tokens must be left out where {ranks} ranks share the prompts, each of which reads its part at "
            f"once; got {prefill_tokens}"
        )


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompts: Sequential[list[int]],
    *,
    room: int,
    prefill_tokens: int | None = None,
    device: torch.device | str = "cpu",
    experts: Experts | None = None,
    mesh: Mesh | None = None,
    spans: int = 2,
) -> tuple[Tensor, DecodingCache]:
    """Logits `[B, Vocab]` after prompts of any length, and the cache from which `next_logits` goes on.

    room: how many more tokens each row may get; the memory for them is made once. prefill_tokens: how many tokens of
    each prompt are read at a time, by default all: it bounds the memory of activations. experts: the ranks that share
    out the model's experts, all of which call it alike. mesh: its sequence ranks, which all call it alike, share the
    prompts, `spans` stretches of each per rank, and each keeps the keys and values of its own; recurrent states end up
    on all of them. Every rank gets the logits.
    """
    check_prompts(model, prompts, prefill_tokens, mesh)
    mesh = mesh or Mesh()
    ranks, group = mesh.sequence_ranks, mesh.sequence_group
    longest, multiple = max(map(len, prompts)), ranks * spans if ranks > 1 else 1
    columns = -(-longest // multiple) * multiple
    starts = [columns - len(prompt) for prompt in prompts]
    rows = [[0] * start + list(prompt) for start, prompt in zip(starts, prompts, strict=True)]
    cache = DecodingCache(starts, columns + room, rank=mesh.sequence_rank, ranks=ranks, group=group)
    tokens = torch.tensor(rows, device=device)
    if ranks > 1:
        seq = Sequence.prefilling(cache, len(prompts), Layout(columns, ranks, spans), experts=experts)
        with uncompiled():
            hidden = of_last(model.hidden(seq.shard(tokens), seq)[:, -1], seq)
        cache.advance(columns)
        return model.head(hidden), cache
    *before, last = tokens.split(prefill_tokens or columns, dim=1)
    for piece in before:
        read(model, piece, cache, experts)
    return next_logits(model, last, cache, experts), cache


@torch.no_grad()
def next_logits(model: LanguageModel, tokens: Tensor, cache: DecodingCache, experts: Experts | None = None) -> Tensor:
    """Logits `[B, Vocab]` after `tokens` int64 `[B, T]`, which follow those that the cache has seen; advances it.

    Where ranks share the cache all of them call it alike.
    """
    return model.head(read(model, tokens, cache, experts)[:, -1])


@torch.no_grad()
def read(
    model: LanguageModel, tokens: Tensor, cache: DecodingCache, experts: Experts | None = None, *, last: bool = True
) -> Tensor:
    """What the head reads of tokens `[B, T]` that follow those of the cache, or of the `last` alone; advances it."""
    seq = Sequence.decoding(cache, tokens.shape[0], tokens.shape[1], experts=experts)
    with uncompiled():
        hidden = model.hidden(tokens, seq, last=last)
    cache.advance(tokens.shape[1])
    return hidden


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel,
    rows: Sequential[list[int]],
    given: Sequential[int],
    *,
    prefill_tokens: int | None = None,
    device: torch.device | str = "cpu",
    experts: Experts | None = None,
) -> list[tuple[float, bool]]:
    """Of each row of ids the log-probability of those after the first `given`, and whether each is the likeliest.

    given: at least 1 of each row, and the others of it are scored. prefill_tokens: how many tokens of each row are
    read at a time: logits of no more exist at once. Raises ValueError for rows that the model cannot read.
    """
    check_prompts(model, rows, prefill_tokens, None)
    if any(not 1 <= number <= len(row) for row, number in zip(rows, given, strict=True)):
        raise ValueError(f"given must be between 1 and the length of each row; got {list(given)}")
    columns = max(map(len, rows))
    starts = [columns - len(row) for row in rows]
    tokens = torch.tensor([[0] * start + list(row) for start, row in zip(starts, rows, strict=True)], device=device)
    first = torch.tensor([start + number for start, number in zip(starts, given, strict=True)], device=device)
    cache = DecodingCache(starts, columns)
    total = torch.zeros(len(rows), dtype=torch.float64, device=device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=device)
    for piece in tokens[:, :-1].split(prefill_tokens or columns, dim=1) if columns > 1 else ():
        begin = cache.length
        hidden = read(model, piece, cache, experts, last=False)
        skip = max(0, int(first.min()) - 1 - begin)  # nothing before is scored
        if skip >= piece.shape[1]:
            continue
        following = torch.arange(begin + skip + 1, cache.length + 1, device=device)
        logits, targets = model.head(hidden[:, skip:]), tokens[:, following]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scored = following >= first.unsqueeze(1)
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        total += torch.where(scored, chosen, 0.0).double().sum(1)
        greedy &= ((logits.argmax(-1) == targets) | ~scored).all(1)
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        kept = ordered.cumsum(0) - ordered < top_p  # a token stays while those before it fall short of top_p
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered * kept)
    return int(torch.multinomial(probabilities, 1, generator=generator))
