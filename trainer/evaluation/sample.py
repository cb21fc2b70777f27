"""Sample: text that the model, in its present state, continues."""

from __future__ import annotations

import torch

from ...models.decoding import generate
from ..data.corpus import Corpus
from ..engine import Engine

PROMPT_TOKENS = 16


def draw_sample(engine: Engine, corpus: Corpus, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """`prompt`, or else the beginning of a held-out document, and `tokens` tokens that the model adds.

    Every rank calls it and draws equally many tokens, since under ZeRO-3 each forward gathers the parameters; a
    document that ends is therefore followed by the next.
    """
    tokenizer = corpus.tokenizer
    if prompt:
        ids = tokenizer.encode_prompt(prompt)
    else:
        ids = corpus.cache[int(corpus.members["validation"][0])][:PROMPT_TOKENS].tolist()
    engine.module.eval()
    try:
        with torch.no_grad():
            drawn = generate(
                engine.module,  # type: ignore[arg-type]
                ids,
                max_new_tokens=tokens,
                temperature=temperature,
                known=tokenizer.ids(),
                seed=seed,
                device=engine.device,
                experts=engine.mesh.experts,
            )
            ids = ids + list(drawn)
    finally:
        engine.module.train()
    return tokenizer.decode(ids)
