"""Cases: what ops are tried on. Those of tests/parallel at the sizes of production, and what large models add."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __path__ as package
from ...kernels.blocks import BlockLayout, BlockTile
from ...kernels.dispatch import choose
from ...kernels.documents import Documents
from ...kernels.grouped_matmul import grouped_matmul
from ...kernels.masks import Dilated, Mask, Pattern
from ...kernels.pointwise import cross_entropy, embedding, gated_norm, rms_norm, rope, rope_frequencies, swiglu
from ...parallel import ops
from ...parallel.sequence import Sequence

PRODUCTION = {"H": 16, "G": 4, "K": 128, "V": 128, "D": 2048, "N": 16, "F": 5632, "W": 32768, "E": 8}
FEW = {"H": 8, "G": 2, "K": 8, "V": 8, "D": 16, "N": 2, "F": 24, "W": 61, "E": 3}  # on a CPU
DISCONTINUOUS = ("blocks of", "short window")  # cases whose result jumps where rounding moves a score, or is a constant
OF_TESTS = ("latent", "wide latent", "blocks of latents")  # cases whose sizes are those of the tests alone
ROW, LATENT = 576, 512  # numbers of a token in DeepSeek's latent attention, and of its latent
OF_LIBRARIES = ("constant decay", "scalar decay", "channel decay", "gated delta", "channel delta")
NORMS = ("RMS norm", "RMS norm of heads")
OF_LIGER = {
    "RMS norm": "rms_norm",
    "RMS norm of heads": "rms_norm",
    "SwiGLU": "swiglu",
    "cross entropy": "cross_entropy",
}
EXACT = ("decay", "strong", "low")  # kinds of inputs that are float32, as mixers give them
Op = Callable[..., Any]


@dataclass(frozen=True)
class Trial:
    """An op with the shapes of its inputs, by the letters of `PRODUCTION`, and how each is drawn.

    call: takes the inputs and `seq`. backend: of the kernels. exact: the types of inputs that are float32 always.
    """

    name: str
    case: Any  # parallel_cases.Case
    backend: str = "auto"
    sizes: tuple[tuple[str, int], ...] = ()  # others than those of `PRODUCTION`

    def draw(self, documents: Documents, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Inputs in `dtype`, or what mixers give, and the gradient of the output in float64."""
        sizes = (PRODUCTION | dict(self.sizes)) if device.type == "cuda" else FEW
        generator = torch.Generator(device).manual_seed(0)
        inputs, dout = self.case.draw(documents.batch, documents.length, generator, sizes)
        kinds = [kind for _, kind in self.case.inputs]
        single = torch.promote_types(dtype, torch.float32)
        drawn = [x.to(single if kind in EXACT else dtype) for x, kind in zip(inputs, kinds, strict=True)]
        return drawn, dout.to(dtype).double()


def of_the_tests(name: str) -> Any:
    """A module of the checkout's tests. Raises ModuleNotFoundError where there is no checkout."""
    tests = Path(package[0]) / "tests"
    if not (tests / "parallel").is_dir():
        raise ModuleNotFoundError(f"no tests in {package[0]}", name="the tests of a checkout")
    for folder in (tests, tests / "parallel", tests / "kernels", tests / "trainer"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


def trials() -> list[Trial]:
    """Everything that is tried, the least certain first."""
    cases = of_the_tests("parallel_cases")
    shared = {
        name: case
        for name, case in cases.CASES.items()
        if name not in OF_TESTS and not any(name.startswith(part) for part in DISCONTINUOUS)
    }
    found = []
    if importlib.util.find_spec("fla") is not None:  # they take longest
        found += [Trial(f"{name}, flash-linear-attention", shared[name], "library") for name in OF_LIBRARIES]
    found += _sparse(cases)
    for name, case in shared.items():
        if case.keys and name != "own attention":
            found.append(Trial(f"{name}, own kernels", case, "triton"))
    found += [Trial(name, case) for name, case in shared.items()]
    found += _attention(cases)
    found += _pointwise(cases)
    return found


def _sparse(cases: Any) -> Iterator[Trial]:
    """Lists as NSA, MoBA and InfLLM-v2 have them; the first was outside its memory with eight warps."""
    wide = (("K", 192), ("V", 128))
    by_group, by_head = listed(64, 16, "G"), listed(512, 3, "H")
    attention = cases.CASES["softmax"]
    for name, call, sizes in (
        ("listed blocks by group (NSA), key dim 192", by_group, (("H", 32), ("G", 2), *wide)),
        ("listed blocks by group (NSA)", by_group, (("H", 32), ("G", 2))),
        ("listed blocks by group, window", listed(64, 16, "G", mask=Mask(window=700, sink_tokens=4)), ()),
        ("listed blocks by group, every third key", listed(64, 16, "G", mask=Dilated(3)), ()),
        ("listed blocks by head (MoBA)", by_head, ()),
        ("listed blocks by head (MoBA), key dim 192", by_head, wide),
        ("listed blocks of runs of queries", listed(64, 16, "H", query_block=64), ()),
    ):
        yield Trial(name, cases.Case(call, attention.inputs, attention.result), sizes=sizes)
    yield Trial("compressed keys (NSA)", cases.Case(compressed, attention.inputs, attention.result))
    inputs = (("T", "H", ROW), "normal"), (("T", ROW), "normal")
    yield Trial("listed latents (DeepSeek-V3.2)", cases.Case(listed_latents(64), inputs, ("T", "H", LATENT)))


def _attention(cases: Any) -> Iterator[Trial]:
    attention, own = cases.CASES["softmax"], "triton"
    for name, mask, sizes in (
        ("long window and sinks, own kernels", Mask(window=1000, sink_tokens=4), ()),
        ("full, own kernels", Mask(causal=False), ()),
        ("softmax, key dim 192, own kernels", Mask(), (("K", 192),)),
        ("softmax, dims of 64, own kernels", Mask(), (("K", 64), ("V", 64))),
        ("softmax, dims of 256, own kernels", Mask(), (("K", 256), ("V", 256))),
    ):
        yield Trial(name, cases.Case(masked(mask), attention.inputs, attention.result), own, sizes)
    yield latent(cases)
    yield replace(latent(cases), name="latent attention, own kernels", backend=own)


def latent(cases: Any) -> Trial:
    """DeepSeek-V3's heads: 64 rotated dims of 192 are shared, and 512 numbers expand to the others and the values."""
    inputs = (("T", "H", 192), "normal"), (("T", 576), "normal"), ((("H", 256), 512), "small")
    return Trial("latent attention", cases.Case(ops.latent_attention, inputs, ("T", "H", 128)))


def _pointwise(cases: Any) -> Iterator[Trial]:
    x, heads = ("T", "D"), ("T", "H", "K")
    for name, call, inputs, result in (
        ("RMS norm", _norm, ((x, "normal"), (("D",), "normal")), x),
        ("RMS norm of heads", _norm, ((heads, "normal"), (("K",), "normal")), heads),
        ("gated norm", _gated_norm, ((heads, "normal"), (heads, "normal"), (("K",), "normal")), heads),
        ("SwiGLU", _swiglu, ((("T", "F"), "normal"), (("T", "F"), "normal")), ("T", "F")),
        ("rotary positions", _rope, ((heads, "normal"),), heads),
        ("cross entropy", _cross_entropy, ((x, "normal"), (("W", "D"), "small")), ()),
        ("embedding", _embedding, ((("W", "D"), "normal"),), x),
        ("products of experts", _experts, ((x, "normal"), (("E", "F", "D"), "small")), ("T", "F")),
    ):
        yield Trial(name, cases.Case(call, inputs, result))
        if name == "products of experts":
            yield Trial(f"{name}, own kernels", cases.Case(call, inputs, result), "triton")
        if name in OF_LIGER and importlib.util.find_spec("liger_kernel") is not None:
            by_library = cases.Case(_by_library(OF_LIGER[name], call), inputs, result)
            yield Trial(f"{name}, Liger-Kernel", by_library, "library")


def _by_library(op: str, call: Op) -> Op:
    """The call with a library chosen for its op, where the sequence asks for one."""

    def chosen(*inputs: Tensor, seq: Sequence) -> Tensor:
        if seq.backend != "library":
            return call(*inputs, seq=seq)
        choose({op: "library"}, inputs[0].device)
        try:
            return call(*inputs, seq=seq)
        finally:
            choose({}, inputs[0].device)

    return chosen


def masked(mask: Pattern) -> Op:
    def call(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence) -> Tensor:
        return ops.softmax_attention(q, k, v, seq=seq, mask=mask)

    return call


def listed(block_size: int, slots: int, owners: str, *, query_block: int = 1, mask: Pattern | None = None) -> Op:
    """Attention to blocks drawn at random, the same for every type: lists for each group, or for each head."""

    def call(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence) -> Tensor:
        rows, pattern = seq.documents, Mask() if mask is None else mask
        tile = BlockTile(BlockLayout(rows, block_size), rows, rows, pattern, query_block)
        lists = of_the_tests("block_lists").random_lists(tile, (k if owners == "G" else q).shape[2], slots)
        return ops.block_sparse_attention(
            q, k, v, lists.to(q.device), seq=seq, block_size=block_size, query_block=query_block, mask=pattern
        )

    return call


def listed_latents(slots: int) -> Op:
    """Latent attention to tokens drawn at random, the same for all heads."""

    def call(q: Tensor, latent: Tensor, *, seq: Sequence) -> Tensor:
        rows = seq.documents
        lists = of_the_tests("block_lists").random_lists(BlockTile(BlockLayout(rows, 1), rows, rows, Mask()), 1, slots)
        return ops.listed_latent_attention(
            q, latent, lists.to(q.device), seq=seq, latent_rank=LATENT, block_size=1, scale=ROW**-0.5
        )

    return call


def compressed(q: Tensor, k: Tensor, v: Tensor, *, seq: Sequence) -> Tensor:
    size, stride = (32, 16) if q.is_cuda else (4, 2)
    keys = ops.window_means(k, seq=seq, size=size, stride=stride, slot="keys")
    values = ops.window_means(v, seq=seq, size=size, stride=stride, slot="values")
    return ops.compressed_attention(q, keys, values, seq=seq, size=size, stride=stride)[0]


def _norm(x: Tensor, weight: Tensor, *, seq: Sequence) -> Tensor:
    return rms_norm(x, weight)


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, *, seq: Sequence) -> Tensor:
    return gated_norm(x, gate, weight)


def _swiglu(gate: Tensor, up: Tensor, *, seq: Sequence) -> Tensor:
    return swiglu(gate, up)


def _rope(x: Tensor, *, seq: Sequence) -> Tensor:
    frequencies, _ = rope_frequencies(x.shape[-1] // 2, 10000.0)
    return rope(x, seq.positions(x.device), inverse_frequencies=frequencies.to(x.device))


def _tokens(seq: Sequence, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = seq.documents.batch, seq.documents.length
    return torch.randint(weight.shape[0], shape, generator=generator).to(weight.device)


def _cross_entropy(hidden: Tensor, weight: Tensor, *, seq: Sequence) -> Tensor:
    return cross_entropy(hidden, weight, _tokens(seq, weight))


def _experts(x: Tensor, weight: Tensor, *, seq: Sequence) -> Tensor:
    """Groups of any size, the last empty, and rows of no group after them."""
    rows, groups = x.flatten(0, 1), weight.shape[0]
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(rows.shape[0], (groups - 1,), generator=generator).sort().values
    ends = torch.cat([ends, ends[-1:]]).to(x.device, torch.int32)
    return grouped_matmul(rows, weight, ends, backend=seq.backend).view(*x.shape[:2], -1)


def _embedding(weight: Tensor, *, seq: Sequence) -> Tensor:
    return embedding(_tokens(seq, weight), weight)
