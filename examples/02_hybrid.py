"""A hybrid language model from a pattern, trained for a few steps on this file, then sampled.

python examples/02_hybrid.py
"""

from functools import partial
from pathlib import Path

import torch

from longreach.kernels.documents import Documents
from longreach.models.decoding import generate
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.gated_linear_attention import GatedLinearAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.sequence import Sequence

model = LanguageModel(
    vocabulary=256,
    width=64,
    depth=4,
    pattern=["linear*3", "softmax"],
    mixers={
        "linear": partial(GatedLinearAttention, heads=4),
        "softmax": partial(SoftmaxAttention, heads=4, kv_heads=2),
    },
    feed_forward=partial(SwiGLU, hidden=128),
    tied_embeddings=True,
)
model.initialise(seed=0)

text = torch.tensor(list(Path(__file__).read_bytes()))[None]
tokens, targets = text[:, :-1], text[:, 1:]
seq = Sequence.single(Documents.whole(1, tokens.shape[1]))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(40):
    loss_sum, count = model(tokens, seq, targets)
    loss = loss_sum / count
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f} nats per byte")

written = generate(model, list(b"from longreach"), max_new_tokens=60, temperature=0.0)
print(repr("from longreach" + bytes(written).decode(errors="replace")))
