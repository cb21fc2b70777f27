"""The sample of a run: begun as documents are, and of tokens that there are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from longreach.launch.build import build
from longreach.parallel.mesh import Mesh
from longreach.trainer.data.tokenizers import Tokenizer, byte_tokenizer
from longreach.trainer.evaluation import sample

MIXERS = "longreach.models.mixers"
MODEL = {
    "_target_": "longreach.models.language_model.LanguageModel",
    "vocabulary": 4000,  # many more rows than the tokenizer has tokens
    "width": 8,
    "depth": 1,
    "pattern": ["softmax"],
    "mixers": {
        "softmax": {"_target_": f"{MIXERS}.softmax.softmax_attention.SoftmaxAttention", "_partial_": True, "heads": 2},
    },
    "feed_forward": {"_target_": "longreach.models.feed_forward.swiglu.SwiGLU", "_partial_": True, "hidden": 8},
}


def test_a_sample_begins_with_bos_and_holds_only_tokens_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    library = byte_tokenizer().library
    library.add_special_tokens(["<s>"])
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer = Tokenizer(library, 256, {})
    model = build(MODEL)
    model.initialise(0)
    read: list[list[int]] = []
    drawn: list[int] = []
    generate = sample.generate

    def seen(module: Any, ids: list[int], **settings: Any) -> list[int]:
        read.append(ids)
        drawn.extend(generate(module, ids, **settings))
        return drawn

    monkeypatch.setattr(sample, "generate", seen)
    engine: Any = SimpleNamespace(module=model, device=torch.device("cpu"), mesh=Mesh.create())
    corpus: Any = SimpleNamespace(tokenizer=tokenizer)
    text = sample.draw_sample(engine, corpus, "Ab", tokens=60, temperature=50.0, seed=1)
    assert read == [[257, 65, 98]]
    assert text.startswith("Ab")
    assert "<s>" not in text
    assert len(drawn) == 60
    assert max(drawn) <= 257
