"""One row of packed documents on four ranks: the same loss and the same gradients as on one.

torchrun --standalone --nproc-per-node 4 examples/03_four_ranks_on_cpu.py
"""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from longreach.kernels.documents import Documents
from longreach.models.feed_forward.swiglu import SwiGLU
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.linear.lightning_attention import LightningAttention
from longreach.models.mixers.softmax.softmax_attention import SoftmaxAttention
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence

if "RANK" not in os.environ:
    sys.exit(f"start it as its four ranks: torchrun --standalone --nproc-per-node 4 {sys.argv[0]}")
dist.init_process_group("gloo")
torch.set_num_threads(1)
mesh = Mesh.create(sequence=dist.get_world_size())

model = LanguageModel(
    vocabulary=100,
    width=48,
    depth=4,
    pattern=["lightning*3", "softmax"],
    mixers={"lightning": partial(LightningAttention, heads=4), "softmax": partial(SoftmaxAttention, heads=4)},
    feed_forward=partial(SwiGLU, hidden=96),
).double()
model.initialise(seed=0)

generator = torch.Generator().manual_seed(1)
tokens, targets = (torch.randint(100, (1, 1024), generator=generator) for _ in range(2))
documents = Documents.from_lengths([[100, 700, 224]])  # borders may fall anywhere


def loss_and_gradient(seq: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Of this rank's tokens under `seq`."""
    model.zero_grad()
    loss, _ = model(seq.shard(tokens), seq, seq.shard(targets))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Two spans per rank: the zigzag, which balances causal attention.
layout = Layout(tokens.shape[1], mesh.sequence_ranks, spans=2)
loss, gradient = loss_and_gradient(Sequence(documents, layout, mesh.sequence_rank, mesh.sequence_group))
dist.all_reduce(loss)
dist.all_reduce(gradient)

whole_loss, whole_gradient = loss_and_gradient(Sequence.single(documents))
if mesh.rank == 0:
    print(f"rank 0 of {mesh.world_size} holds {layout.local_length} of {layout.length} tokens")
    print(f"loss on {mesh.world_size} ranks {loss.item():.12f}, on one {whole_loss.item():.12f}")
    worst = (gradient - whole_gradient).abs().max() / whole_gradient.abs().max()
    print(f"largest difference of any gradient, relative to the largest gradient: {worst.item():.1e}")
dist.destroy_process_group()
