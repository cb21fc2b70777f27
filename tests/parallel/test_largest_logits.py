"""The largest logit of each head, over all ranks, against a whole matrix of logits: packed, masked, grouped, latent."""

import math
from typing import Any

import pytest
import torch
from distributed import run_threads
from parallel_cases import shared
from torch import Tensor

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.softmax.largest_logits import SHARPNESS
from longreach.parallel import ops
from longreach.parallel.sequence import Sequence

LENGTH, HEADS, WINDOW = 48, 4, 9
PACKED = ((7, 20, 1, 13), (LENGTH,))  # the first row ends in padding
ABOVE = math.log(LENGTH) / SHARPNESS


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, LENGTH, HEADS, 8), "k": (2, LENGTH, 2, 8), "v": (2, LENGTH, 2, 6)}
    shapes |= {"latent": (2, LENGTH, 3 + 5), "expansion": (HEADS * (5 + 6), 5)}
    return {name: (3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def expected(x: dict[str, Tensor], latent: bool, window: int | None) -> Tensor:
    """By every pair of a query and a key."""
    q, k = x["q"].double(), x["k"].double().repeat_interleave(2, dim=2)
    if latent:
        own = x["expansion"].double().view(HEADS, 11, 5)[:, :5]
        shared_part = x["latent"][:, :, None, :3].double().expand(-1, -1, HEADS, -1)
        k = torch.cat([shared_part, torch.einsum("btc,hkc->bthk", x["latent"][..., 3:].double(), own)], dim=-1)
    logits = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(8)
    for row, lengths in enumerate(PACKED):
        ids = torch.full((LENGTH,), -1)
        ids[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        place = torch.arange(LENGTH)
        seen = (ids[:, None] == ids) & (ids >= 0) & (place[:, None] >= place)
        seen &= place[:, None] - place < (window or LENGTH)
        logits[row].masked_fill_(~seen, -math.inf)
    return logits.amax((0, 2, 3))


def measure(seq: Sequence, x: dict[str, Tensor], latent: bool, window: int | None) -> Tensor:
    here = {name: seq.shard(value) if value.dim() > 2 else value for name, value in x.items()}
    here["q"].requires_grad_()
    largest = torch.full((HEADS,), -math.inf)
    given: dict[str, Any] = {"seq": seq, "mask": Mask(window=window), "largest": largest}
    if latent:
        out = ops.latent_attention(here["q"], here["latent"], here["expansion"], **given)
    else:
        out = ops.softmax_attention(here["q"], here["k"], here["v"], **given)
    out.sum().backward()
    assert largest.grad_fn is None
    return largest


def on_ranks(rank: int, world: int, strategy: str, dtype: torch.dtype, latent: bool, window: int | None) -> Tensor:
    seq = shared(world, 2, Documents.from_lengths(PACKED, LENGTH), strategy)
    return measure(seq, drawn(dtype), latent, window)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("world", "strategy"), [(1, "default"), (2, "default"), (4, "gather"), (2, "ulysses")])
def test_the_largest_logit_of_each_head(world: int, strategy: str, window: int | None, latent: bool) -> None:
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        found = torch.stack(run_threads(world, on_ranks, strategy, dtype, latent, window)).amax(0).double()
        wanted = expected(drawn(dtype), latent, window)
        off = rounding * wanted.abs() * (3 if latent else 1)  # keys that are made of the latent are rounded too
        assert (found >= wanted - off).all()
        assert (found <= wanted + ABOVE + off).all()


def test_nothing_is_measured_without_gradients() -> None:
    x, largest = drawn(torch.float32), torch.full((HEADS,), -math.inf)
    seq = Sequence.single(Documents.from_lengths(PACKED, LENGTH))
    with torch.no_grad():
        ops.softmax_attention(x["q"], x["k"], x["v"], seq=seq, largest=largest)
    assert (largest == -math.inf).all()
