"""One op by itself: packed documents, a state that the next call continues from, and gradients.

python examples/01_one_op.py
"""

import torch

from longreach.kernels.documents import Documents
from longreach.kernels.gated_linear import gated_linear_attention

torch.manual_seed(0)
batch, tokens, heads, key_dim, value_dim = 1, 1000, 4, 32, 48
q = torch.randn(batch, tokens, heads, key_dim, requires_grad=True)
k = torch.randn(batch, tokens, heads, key_dim, requires_grad=True)
v = torch.randn(batch, tokens, heads, value_dim, requires_grad=True)
log_decay = -0.1 * torch.rand(batch, tokens, heads)  # S_t = e^{g_t} S_{t-1} + k_t v_t

# Three documents in one row: no state crosses from one to the next.
documents = Documents.from_lengths([[300, 650, 50]])
out, final_state = gated_linear_attention(q, k, v, log_decay, documents=documents)
alone, _ = gated_linear_attention(q[:, 300:950], k[:, 300:950], v[:, 300:950], log_decay[:, 300:950])
print("a packed document computes the same as alone:", torch.allclose(out[:, 300:950], alone, atol=1e-5))

# The same row in two pieces: the second continues from the state that the first leaves.
first, state = gated_linear_attention(q[:, :600], k[:, :600], v[:, :600], log_decay[:, :600],
                                      documents=documents.slice(0, 600))  # fmt: skip
second, _ = gated_linear_attention(q[:, 600:], k[:, 600:], v[:, 600:], log_decay[:, 600:], initial_state=state,
                                   documents=documents.slice(600, 1000))  # fmt: skip
print("two pieces compute the same as the whole:    ", torch.allclose(torch.cat([first, second], 1), out, atol=1e-5))

out.square().sum().backward()
print("gradients:", {name: tuple(x.grad.shape) for name, x in (("q", q), ("k", k), ("v", v))})
