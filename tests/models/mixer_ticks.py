"""What the table of mixers ticks: each is tried here at small sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_presets import build_mixer, in_pieces
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.parallel.layout import Layout
from longreach.parallel.mesh import Mesh
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy
from longreach.parallel.threads import run_as_threads

LENGTHS = [7, 19, 1, 12]  # of the documents of a row


def trains(name: str) -> bool:
    """Whether the input and every parameter get a gradient."""
    mixer, x = build_mixer(name), drawn().requires_grad_()
    (mixer(x, packed()) * drawn(1)).sum().backward()
    return all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in (x, *mixer.parameters()))


def packs(name: str) -> bool:
    """Whether documents of a row give what they give alone."""
    mixer, x = build_mixer(name), drawn()
    parts = x.split(LENGTHS, dim=1)
    alone = torch.cat([mixer(part, Sequence.single(Documents.whole(1, part.shape[1]))) for part in parts], dim=1)
    return close(mixer(x, packed()), alone)


def runs_on_ranks(name: str) -> bool:
    """Whether three ranks give the output and the gradient of one."""
    documents, layout = Documents.from_lengths([LENGTHS]), Layout(sum(LENGTHS), 3)

    def forward_and_backward(seq: Sequence) -> tuple[Tensor, Tensor]:
        x = seq.shard(drawn()).requires_grad_()
        out = build_mixer(name)(x, seq)
        return out.detach(), torch.autograd.grad(out, x, seq.shard(drawn(1)))[0]

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        return forward_and_backward(Sequence.shared(documents, layout, Mesh.create(3), Strategy()))

    gathered = [layout.unshard(list(parts)) for parts in zip(*run_as_threads(3, on_rank), strict=True)]
    return all(map(close, gathered, forward_and_backward(Sequence.single(documents))))


def decodes(name: str) -> bool:
    """Whether token by token after a prompt gives what the whole row gives."""
    mixer, x = build_mixer(name), drawn()
    length = x.shape[1]
    return close(in_pieces(mixer, x, [length - 9] + [1] * 9), mixer(x, Sequence.single(Documents.whole(1, length))))


def runs_in_triton(name: str) -> bool:
    """Whether Triton's kernels, here under its interpreter, give the output and gradient of PyTorch's operations."""
    found = []
    for backend in ("triton", "chunked"):
        mixer, x = build_mixer(name, torch.float32), drawn()[:, :12].float().requires_grad_()
        try:
            out = mixer(x, Sequence.single(Documents.from_lengths([[7, 5]]), backend=backend))
        except ValueError:  # no such kernels
            return False
        found.append((out.detach(), *torch.autograd.grad(out, x, drawn(1)[:, :12].float())))
    return all(bool((ours - theirs).norm() <= 1e-3 * theirs.norm()) for ours, theirs in zip(*found, strict=True))


def drawn(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64, generator=generator)


def packed() -> Sequence:
    return Sequence.single(Documents.from_lengths([LENGTHS]))


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-9 * expected.norm())


TICKS: dict[str, Callable[[str], bool]] = {
    "trains": trains,
    "packed": packs,
    "ranks": runs_on_ranks,
    "decodes": decodes,
    "Triton": runs_in_triton,
}
