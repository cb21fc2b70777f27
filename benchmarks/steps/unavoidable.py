"""The work that no training step of a model can do without, alone: what bounds how fast any step can be here.

It is the products of every linear layer, router, expert and head, of forward and both of backward, causal softmax
attention by the fastest op at hand, and AdamW. All else is left out: linear attention, norms, activations, rotations,
the loss, routing, sums of gradients, and whatever packing or transposing a product would need before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longreach.kernels.documents import Documents
from longreach.kernels.masks import Mask
from longreach.kernels.softmax import softmax_attention
from longreach.models.feed_forward.experts import Experts, MixtureOfExperts
from longreach.models.feed_forward.router import Router
from longreach.models.language_model import LanguageModel
from longreach.models.mixers.softmax.attention import Attention
from longreach.models.mixers.softmax.latent_attention import LatentAttention
from longreach.parallel.layout import Layout
from longreach.parallel.sequence import Sequence
from longreach.parallel.strategy import Strategy

TILES = (512, 2048)  # rows that a product may run on at a time, beside all of them
LARGEST = 1 << 24  # outputs of a product that exist at a time: logits of a row never do
TRIALS = 3  # of each way to compute something, in turn; that of the lowest median is taken

Run = Callable[[], Any]
_onednn, _packed = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight


class Product(NamedTuple):
    """`rows` times the matrices of layers that read the same inputs: `[rows, inputs]` to `[rows, each of outputs]`."""

    rows: int
    inputs: int
    outputs: tuple[int, ...]

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * sum(self.outputs)


class Softmax(NamedTuple):
    """Causal attention to a document of so many tokens."""

    tokens: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Work(NamedTuple):
    """What a step computes, in the order of forward, and how many parameters AdamW steps."""

    parts: list[Product | Softmax]
    parameters: int


def work_of(model: LanguageModel, lengths: list[int]) -> Work:
    """That of a step on a row of documents of so many tokens; the model is on `meta`.

    Experts have even shares of the rows. Raises ValueError where the products of forward are not all of what the model
    states in `flops` but for its mixers' ops.
    """
    parts, places, read = list[Product | Softmax](), dict[tuple[int, int], int](), list[Tensor]()
    documents, length = Documents.from_lengths([lengths]), sum(lengths)
    seq = Sequence.rehearsal(documents, Layout(length), Strategy())

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Linear):
            parts.extend(_parts(module, inputs, lengths))
            return
        reader = id(inputs[0]), module.in_features
        read.append(inputs[0])  # so that no other tensor gets its id
        if reader in places:  # layers that read one tensor are one product, which may be faster than several
            before = cast(Product, parts[places[reader]])
            parts[places[reader]] = before._replace(outputs=(*before.outputs, module.out_features))
        else:
            places[reader] = len(parts)
            parts.append(Product(length, module.in_features, (module.out_features,)))

    hooks = [module.register_forward_pre_hook(see) for module in model.modules()]
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    model(tokens, seq, tokens)
    for hook in hooks:
        hook.remove()
    ops = sum(each.mixing_flops(seq) for _, each in model.leaves() if not isinstance(each, MixtureOfExperts))
    counted = sum(part.flops for part in parts if isinstance(part, Product))
    if counted != model.flops(documents) - ops:
        raise ValueError(
            f"products must have the {model.flops(documents) - ops:,} FLOPs that the model states; got {counted:,}. "
            "Tell unavoidable.py of the layers that it does not know"
        )
    return Work(parts, model.parameter_count())


def _parts(module: nn.Module, inputs: tuple[Any, ...], lengths: list[int]) -> Iterator[Product | Softmax]:
    if isinstance(module, Router):
        yield Product(sum(lengths), module.weight.shape[1], (module.experts,))
    elif isinstance(module, Experts):
        experts, hidden, width = module.up.weight.shape
        rows = inputs[1].numel() // experts
        first = (hidden,) if module.gate is None else (hidden, hidden)
        for _ in range(experts):
            yield Product(rows, width, first)
            yield Product(rows, hidden, (module.down.weight.shape[1],))
    elif isinstance(module, Attention):
        yield from (Softmax(n, module.heads, module.kv_heads, module.head_dim, module.head_dim) for n in lengths)
    elif isinstance(module, LatentAttention):
        yield from (Softmax(n, module.heads, module.heads, module.key_dim, module.value_dim) for n in lengths)


class Passes(NamedTuple):
    """Ways to compute a part: the fastest found of its forward and its backward, and the seconds of both."""

    forward: list[Run]
    backward: list[Run]
    seconds: float


def fastest(ways: list[Run]) -> tuple[Run, float]:
    """That of the lowest median, and its seconds."""
    taken: list[list[float]] = [[] for _ in ways]
    for trial in range(1 + TRIALS):
        for way, times in zip(ways, taken, strict=True):
            start = time.process_time()
            way()
            if trial:
                times.append(time.process_time() - start)
    medians = [statistics.median(times) for times in taken]
    best = min(range(len(ways)), key=medians.__getitem__)
    return ways[best], medians[best]


def product_passes(product: Product) -> Passes:
    """Of layers together or one by one, whichever is faster."""
    together = _one_product(product.rows, product.inputs, sum(product.outputs))
    if len(product.outputs) == 1:
        return together
    each = {size: _one_product(product.rows, product.inputs, size) for size in set(product.outputs)}
    apart = [each[size] for size in product.outputs]
    if sum(passes.seconds for passes in apart) > together.seconds:
        return together
    forward, backward = ([run for passes in apart for run in passes[place]] for place in (0, 1))
    return Passes(forward, backward, sum(passes.seconds for passes in apart))


def _one_product(rows: int, inputs: int, outputs: int) -> Passes:
    chosen = [fastest(each) for each in ways(rows, inputs, outputs)]
    runs = [run for run, _ in chosen]
    return Passes(runs[:1], runs[1:], sum(seconds for _, seconds in chosen))


def ways(rows: int, inputs: int, outputs: int) -> tuple[list[Run], list[Run], list[Run]]:
    """Of y = x W^T, dx = dy W and dW = dy^T x: by MKL and by oneDNN, with matrices as they are and transposed, of all
    rows and of tiles of them. What oneDNN packs is packed beforehand. Each returns its results by tile."""
    held = rows if rows * outputs <= LARGEST else max(TILES)  # rows of outputs: tiles share these
    x, y, w = torch.randn(rows, inputs), torch.randn(held, outputs), torch.randn(outputs, inputs)
    wt, xt, yt = (matrix.t().contiguous() for matrix in (w, x, y))
    dx, dw, dwt, out = (torch.empty_like(like) for like in (x, w, wt, y))
    forward, of_inputs, of_weights = list[Run](), list[Run](), list[Run]()
    for tile in (*(tile for tile in TILES if tile < rows), *((rows,) if held == rows else ())):
        here = [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]
        there = [slice(at.start % held, at.start % held + at.stop - at.start) for at in here]
        xs, dxs, ys, outs = (
            [x[at] for at in here],
            [dx[at] for at in here],
            [y[at] for at in there],
            [out[at] for at in there],
        )
        by_columns = [yt[:, at].contiguous() for at in there[:1]], [xt[:, at].contiguous() for at in here[:1]]
        packed, turned = _packed(w, tile), _packed(wt, tile)
        forward += [
            partial(_each, lambda a, to: torch.mm(a, w.t(), out=to), xs, outs),
            partial(_each, lambda a, to: torch.mm(a, wt, out=to), xs, outs),
            partial(_each, partial(_packed_product, packed), xs, outs),
        ]
        of_inputs += [
            partial(_each, lambda a, to: torch.mm(a, w, out=to), ys, dxs),
            partial(_each, lambda a, to: torch.mm(a, wt.t(), out=to), ys, dxs),
            partial(_each, partial(_packed_product, turned), ys, dxs),
        ]
        of_weights += [
            partial(_each, lambda a, b: torch.mm(a.t(), b, out=dw), ys, xs),
            partial(_each, lambda a, b: torch.mm(b.t(), a, out=dwt), ys, xs),
        ]
        if rows % tile == 0:  # over one tile, which stays in the caches
            of_weights.append(
                partial(
                    _each, lambda a, b: _onednn(a, b, None, "none", [], ""), *(side * len(here) for side in by_columns)
                )
            )
    return forward, of_inputs, of_weights


def _packed_product(matrix: Tensor, a: Tensor, _: Tensor) -> Tensor:
    return _onednn(a, matrix, None, "none", [], "")


def _each(run: Callable[[Tensor, Tensor], Tensor], first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [run(a, b) for a, b in zip(first, second, strict=True)]


def softmax_passes(at: Softmax) -> Passes:
    """By torch's kernel, of tensors by head and by token, or by this package's op. Forward is timed with backward."""

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(1, at.tokens, heads, dim, requires_grad=True)

    q, k, v = draw(at.heads, at.key_dim), draw(at.kv_heads, at.key_dim), draw(at.kv_heads, at.value_dim)
    short = draw(at.kv_heads, at.key_dim)  # values as long as keys, of which torch has the one kernel
    documents = Documents.whole(1, at.tokens)

    def ours() -> None:
        out = softmax_attention(q, k, v, mask=Mask(), documents=documents)
        torch.autograd.grad(out, (q, k, v), out.detach())  # type: ignore[arg-type, union-attr]

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=at.heads > at.kv_heads)
        torch.autograd.grad(out, (q, k, v), out.detach())

    by_token = [x.transpose(1, 2) for x in (q, k, v if at.value_dim == at.key_dim else short)]
    by_head = [x.detach().contiguous().requires_grad_() for x in by_token]
    run, seconds = fastest([ours, partial(kernel, *by_token), partial(kernel, *by_head)])
    return Passes([], [run], seconds)


class Unavoidable:
    """The work of a step of the model in a folder, on a row of documents of so many tokens."""

    def __init__(self, folder: Path, lengths: list[int]) -> None:
        from hydra.utils import instantiate

        from longreach.models import hf

        with torch.device("meta"):
            model = instantiate(hf.read_settings(folder), _convert_="all")
        self.work = work_of(model, lengths)
        self._passes = {
            part: product_passes(part) if isinstance(part, Product) else softmax_passes(part)
            for part in dict.fromkeys(self.work.parts)
        }
        parameter = nn.Parameter(torch.zeros(self.work.parameters))
        parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.AdamW([parameter], fused=True)
        self._optimizer.step()

    def step(self) -> dict[str, float]:
        """Processor seconds of products, of attention and of AdamW, in the order of a step."""
        seconds: dict[str, float] = {"products": 0.0, "attention": 0.0, "optimizer": 0.0}

        def run(part: Product | Softmax, runs: list[Run]) -> None:
            start = time.process_time()
            for each in runs:
                each()
            seconds["products" if isinstance(part, Product) else "attention"] += time.process_time() - start

        for part in self.work.parts:
            run(part, self._passes[part].forward)
        for part in reversed(self.work.parts):
            run(part, self._passes[part].backward)
        start = time.process_time()
        self._optimizer.step()
        seconds["optimizer"] = time.process_time() - start
        return seconds
