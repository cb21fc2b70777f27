"""Truth: the results of a case on one process, by `definitions` and the references of recurrences alone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import kernels
from ...kernels import operation, pointwise
from ...kernels.attend import OnOneDevice
from ...kernels.documents import Documents
from ...models.language_model import LanguageModel
from ...parallel import ops
from ...parallel.sequence import Sequence
from . import definitions, selections
from .cases import Case, FarSequence
from .choices import choices, noted_lists
from .model import first_parts

Op = Callable[..., Tensor | tuple[Tensor, ...]]
BESIDE = ("keys_as", "keys_of", "largest")  # say where decoding keeps keys, and what is measured: outputs are the same
WITH_LSE = ("compressed_attention",)  # ops that give mixers the log-sum-exp too
IN_PARTS = ("short_conv",)  # ops that take their first argument in parts too, and give the output so
SUMMARIES = {  # of windows, known to every rank
    "compressed_attention": ("k", "v"), "select_blocks": ("summaries",), "gate_divergence": ("gate_k",),
}  # fmt: skip
POINTWISE = ("cross_entropy", "rms_norm", "rope", "swiglu")
OF_THE_ROW = ("window_means", "local_windows")  # their replayed output is of the whole row, on every rank


@dataclass
class Call:
    """One call of an op: its layer, and its inputs for the whole rows."""

    layer: int
    mixer: str  # its name in the pattern
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size  # of the output
    variant: str = ""  # how the call differs from the one in the model

    @property
    def of_the_row(self) -> bool:
        """Whether every rank has the whole output, rather than that of its tokens."""
        return self.op in OF_THE_ROW

    def tensors(self) -> list[Tensor]:
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def per_token(self, length: int) -> list[bool]:
        """Which of `tensors` have one value per token, `[B, N, …]`, and are split among ranks."""
        summaries = SUMMARIES.get(self.op, ())
        return [
            x.dim() >= 3 and x.shape[1] == length and name not in summaries
            for name, x in zip(self.names(), self.tensors(), strict=True)
        ]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor changed."""
        args, kwargs = pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def dout(self, dtype: torch.dtype) -> Tensor:
        """A random gradient for the output."""
        generator = torch.Generator("cpu").manual_seed(self.layer)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def names(self) -> list[str]:
        """The names of `tensors`."""
        bound = inspect.signature(getattr(ops, self.op)).bind(*self.args, **self.kwargs, seq=None)
        named = [
            (name, x)
            for name, value in bound.arguments.items()
            for x in pytree.tree_leaves(value)
            if isinstance(x, Tensor)
        ]
        order = {id(x): name for name, x in named}
        return [order[id(x)] for x in self.tensors()]


@dataclass
class Result:
    """The results of a model for a case: for whole rows, or for the part of one rank.

    reports: the auxiliary losses by path, as sums over tokens. The gradients are of the loss and of these.
    """

    loss: Tensor
    targets: int
    gradients: dict[str, Tensor]
    layers: list[Tensor]  # outputs of the mixers [B, T, D]
    hidden: Tensor  # what the head reads [B, T, D]
    reports: dict[str, Tensor] = field(default_factory=dict)  # sums of auxiliary losses and other sums, by path
    choices: dict[str, Tensor] = field(default_factory=dict)  # of experts, by router: [B, T, k]
    lists: list[Tensor] = field(default_factory=list)  # what the mixers selected, int32 [B, T, …], in their order
    calls: list[Call] = field(default_factory=list)


def package_of(name: str) -> ModuleType | None:
    """The package of kernels whose op an op of `parallel.ops` is named after."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            package = importlib.import_module(f"{kernels.__name__}.{module.name}")
            if callable(getattr(package, name, None)):
                return package
    return None


def plain(name: str, backend: str = "reference") -> Op:
    """The op on one device without ranks: as it is defined, or by another backend of its kernel."""
    return _of_parts(_of_whole(name, backend)) if name in IN_PARTS else _of_whole(name, backend)


def _of_parts(whole: Op) -> Op:
    def op(x: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if not isinstance(x, tuple):
            return whole(x, *args, **kwargs)
        joined = cast(Tensor, whole(torch.cat(x, dim=-1), *args, **kwargs))
        return joined.split([part.shape[-1] for part in x], dim=-1)

    return op


def _of_whole(name: str, backend: str) -> Op:
    if backend == "reference" and (function := _definition(name)) is not None:
        return _defined(name, function)
    if name == "attention":
        return _attention(backend)
    if name == "recurrent":
        return _recurrent(backend)
    package = package_of(name)
    if package is None:
        return getattr(ops, name)
    kernel = getattr(package, name)
    if name in WITH_LSE:
        kernel = partial(kernel, return_lse=True)

    def op(*args: Any, seq: Sequence, slot: str = "", **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        result = kernel(*args, **kwargs, documents=seq.documents, backend=backend)
        return result if name in WITH_LSE else output_of(name, result)

    return op


def _attention(backend: str) -> Op:
    """An op over keys that is passed as its `Attend`, a user's too."""

    def op(attend: Callable[..., Any], inputs: Any, settings: tuple = (), *, seq: Sequence, slot: str = "") -> Tensor:
        made = attend(*settings)
        return operation.run(OnOneDevice(made), inputs, (made.tile(seq.documents, seq.documents), backend))[0]

    return op


def _recurrent(backend: str) -> Op:
    """An op that is offered as its recurrence, whoever wrote it."""

    def op(
        recurrence: Callable[..., Any], inputs: Any, settings: tuple = (), *, seq: Sequence, slot: str = ""
    ) -> Tensor:
        return recurrence(*settings)(inputs, documents=seq.documents, backend=backend)[0]

    return op


def _definition(name: str) -> Op | None:
    return getattr(definitions, name, getattr(selections, name, None))


def _defined(name: str, function: Op) -> Op:
    def op(*args: Any, seq: Sequence, slot: str = "", **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if name == "gather_windows":
            kwargs["length"] = seq.layout.length
        lengths = [[run.length for run in row if not run.is_padding] for row in seq.documents.runs]
        return function(*args, **kwargs, lengths=lengths)

    return op


def replayed(name: str, find: Callable[[str], Op]) -> Op:
    """The op by which a call is replayed, of those that `find` returns.

    What ranks hold of windows differs by layout, so that `local_windows` is followed by something made of each window,
    not linear and different by place, and by `gather_windows`. Its derivatives are powers of two: the gradient of a
    window is exact in any type, and what is rounded is what the op adds up.
    """
    if name != "local_windows":
        return find(name)
    cut, gather = find("local_windows"), find("gather_windows")

    def there_and_back(x: Tensor, *, seq: Sequence, size: int, stride: int, slot: str = "") -> Tensor:
        rows = cast(Tensor, cut(x, seq=seq, size=size, stride=stride))
        places = torch.arange(size, device=x.device)
        weights = 0.5 ** (places % 4) * (1 - 2 * (places // 4 % 2))  # 1, 1/2, 1/4, 1/8, -1, -1/2, …
        exact = rows.to(torch.promote_types(x.dtype, torch.float32))
        made = torch.einsum("bws...,s->bw...", exact, weights.to(exact.dtype)).abs() + 1.0
        return cast(Tensor, gather(made.to(x.dtype), seq=seq, size=size, stride=stride))

    return there_and_back


def shared_op(name: str) -> Op:
    """The op as ranks replay it."""
    return replayed(name, lambda name: getattr(ops, name))


def plain_op(name: str, backend: str = "reference") -> Op:
    """The same on one device."""
    return replayed(name, lambda name: plain(name, backend))


def output_of(name: str, result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output among the results of an op, whole where it came in parts."""
    if not isinstance(result, tuple):
        return result
    return torch.cat(result, dim=-1) if name in IN_PARTS else result[0]


@contextmanager
def plain_ops(calls: list[Call], names: list[str], backend: str = "reference") -> Iterator[None]:
    """Inside, mixers, whose names in the pattern are `names`, call the ops of one device; every call is recorded.

    Modules of multi-token prediction have the mixers of the last layer.
    """
    originals = {name: getattr(ops, name) for name in ops.__all__}

    def noting(name: str, op: Op) -> Op:
        def call(*args: Any, seq: Sequence, slot: str = "", **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
            if name == "keep_keys":
                return op(*args, seq=seq, **kwargs)
            kwargs = {setting: value for setting, value in kwargs.items() if setting not in BESIDE}
            result = op(*args, seq=seq, **kwargs)
            shape = output_of(name, result).shape
            if name == "local_windows":  # see `replayed`
                shape = torch.Size((shape[0], seq.layout.length // kwargs["stride"], *shape[3:]))
            if name != "gather_windows":
                noted = Call(seq.layer, names[min(seq.layer, len(names) - 1)], name, args, kwargs, shape)
                calls.append(noted.mapped(lambda x: x.detach().clone()))
            return result

        return call

    with ExitStack() as restored:
        for name, original in originals.items():
            restored.callback(setattr, ops, name, original)
            setattr(ops, name, noting(name, plain(name, backend)))
        if backend == "reference":
            _define_pointwise(restored)
        yield


def _define_pointwise(restored: ExitStack) -> None:
    """Models use the definitions of `kernels.pointwise`, until `restored` closes."""
    models = LanguageModel.__module__.rpartition(".")[0]
    for module in [module for name, module in sys.modules.items() if name.startswith(models)]:
        for name in POINTWISE:
            original = getattr(pointwise, name)
            if vars(module).get(name) is original:
                restored.callback(setattr, module, name, original)
                setattr(module, name, getattr(definitions, name))


def run(
    model: LanguageModel,
    seq: Sequence,
    tokens: Tensor,
    targets: Tensor,
    factors: Mapping[str, float] | None = None,
    *,
    told: Mapping[str, Tensor] | None = None,
) -> Result:
    """Forward and backward of the tokens of `seq`'s rank.

    factors: what auxiliary losses are multiplied by, by path, before they join the loss; by default their weights.
    told: the experts that routers choose; see `choices`.
    """
    layers: list[Tensor] = []
    hidden: list[Tensor] = []

    def note(module: Any, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        layers.append(first.detach())

    mixers = first_parts(model)
    hooks = [mixer.register_forward_hook(note) for mixer in mixers]
    hooks.append(model.norm.register_forward_hook(lambda module, arguments, output: hidden.append(output.detach())))
    try:
        with choices(model, seq, told) as chosen:
            with noted_lists() as lists:
                loss, count, reports = model(tokens, seq, targets, False, True)
            model.zero_grad(set_to_none=True)
            with_auxiliary(model, loss, reports, factors).backward()  # which may recompute
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }
    # Recomputation runs the hooks a second time.
    reported = {path: value.detach() for path, value in reports.items()}
    return Result(loss.detach(), int(count), gradients, layers[: len(mixers)], hidden[0], reported, chosen, lists)


def with_auxiliary(
    model: LanguageModel,
    loss: Tensor,
    reports: Mapping[str, Tensor],
    factors: Mapping[str, float] | None = None,
) -> Tensor:
    """The sum of the token losses, and of the auxiliary ones times `factors`; see `run`."""
    for path, factor in (model.losses if factors is None else factors).items():
        loss = loss + factor * reports[path]
    return loss


def truth_of(
    model: LanguageModel,
    case: Case,
    told: Mapping[str, Tensor] | None = None,
    *,
    lists: list[Tensor] | None = None,
) -> Result:
    """The case on one process, by definitions alone; `told` as in `run`, `lists` what mixers select."""
    calls: list[Call] = []
    with ExitStack() as stack:
        stack.enter_context(plain_ops(calls, model.names))
        if lists is not None:
            given = iter(lists)
            recorded = ops.select_blocks
            stack.callback(setattr, ops, "select_blocks", recorded)
            ops.select_blocks = lambda *args, **kwargs: (recorded(*args, **kwargs), next(given))[1]
        seq = Sequence.single(case.documents)
        result = run(model, FarSequence.of_near(seq) if case.far else seq, case.tokens, case.targets, told=told)
    result.calls = calls
    return result


def alone(model: LanguageModel, case: Case) -> Tensor:
    """`[B, N, D]`: the hidden states where each document is a row of its own; zero at padding."""
    out: Tensor | None = None
    with torch.no_grad(), plain_ops([], model.names):
        for row, lengths in enumerate(case.lengths):
            start = 0
            for size in lengths:
                tokens = case.tokens[row : row + 1, start : start + size]
                hidden = model.hidden(tokens, Sequence.single(Documents.whole(1, size)))
                out = hidden.new_zeros(*case.tokens.shape, hidden.shape[-1]) if out is None else out
                out[row, start : start + size] = hidden[0]
                start += size
    assert out is not None
    return out


def gradients_of(op: Any, call: Call, dout: Tensor, seq: Sequence) -> list[Tensor]:
    """[output, gradient of each tensor of the call]."""
    leaves = call.mapped(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))
    out = output_of(call.op, op(*leaves.args, **leaves.kwargs, seq=seq))
    if out.requires_grad:
        out.backward(dout.to(out.dtype))
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves.tensors()]
    return [out.detach() if out.is_floating_point() else out.double(), *gradients]
