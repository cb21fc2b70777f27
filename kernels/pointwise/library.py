"""RMS norm, SwiGLU and cross entropy by Liger-Kernel, which is trusted after a test against the definitions.

Its signatures change between versions. So no version is checked: options go by name to the signature that is found,
and each kind of problem is tried on a small one first, once per process and device. Hsu et al., 2024, arXiv 2410.10989.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import announce, unrecorded

NO_TARGET = -100
TOLERANCE = 0.02  # relative, of norms: rounding in bfloat16 gives less, a wrong scale more
FEW, MANY, NARROW = 37, 2**15 + 5, 256  # rows to try; Liger has another kernel for many rows of so few numbers
TOKENS, WIDTH, VOCABULARY = 70, 48, 515  # that cross entropy is tried on: several chunks, the last of them short

Function = Callable[..., Tensor]

_verdicts: dict[tuple[object, ...], str | None] = {}


class Trial(NamedTuple):
    """A small problem: its floating-point inputs, what the library makes of them, and the definition of that."""

    inputs: list[Tensor]
    library: Function
    definition: Function


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times offset + weight, or times offset alone; differentiable.

    Raises ValueError where the library cannot run it.
    """
    dim = x.shape[-1]
    if weight is None:  # which not every version takes
        weight, offset = x.new_full((dim,), offset, dtype=torch.float32), 0.0
    rows = MANY if dim <= NARROW and x.numel() >= MANY * dim else FEW

    def trial() -> Trial:
        def definition(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)

        draw = _Drawing(x.device)
        inputs = [draw(rows, dim, dtype=x.dtype), draw(dim, dtype=weight.dtype)]
        return Trial(inputs, lambda x, weight: _norm(x, weight, eps, offset), definition)

    _require("rms_norm", x, (weight.dtype, dim, rows, eps, offset), trial)
    return _norm(x, weight, eps, offset)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable. Raises ValueError where the library cannot run it."""

    def trial() -> Trial:
        draw = _Drawing(gate.device)
        inputs = [draw(FEW, gate.shape[-1], dtype=gate.dtype) for _ in range(2)]
        return Trial(inputs, _SwiGLU.apply, lambda gate, up: F.silu(gate) * up)  # type: ignore[arg-type]

    _require("swiglu", gate, (gate.shape[-1],), trial)
    return _SwiGLU.apply(gate, up)  # type: ignore[return-value]


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The sum of token losses of `longreach.kernels.pointwise.cross_entropy`, differentiable.

    Gradients are computed in forward and kept until backward, that of the weight too. The host waits for the device.
    A target outside the vocabulary gives a loss of NaN. Raises ValueError where the library cannot run it.
    """
    if chunk is not None or logit_scale != 1.0 or softcap is not None:
        what = "has no logit_scale" if softcap is None else "is not called with a softcap"
        what = what if chunk is None else "chooses its own chunks"
        raise _refusal("cross_entropy", f"Liger-Kernel {what}")

    def trial() -> Trial:
        draw = _Drawing(hidden.device)
        ids = torch.arange(TOKENS, device=hidden.device) * 37 % VOCABULARY
        ids[::5] = NO_TARGET
        shapes = [(TOKENS, WIDTH), (VOCABULARY, WIDTH)] + ([] if bias is None else [(VOCABULARY,)])
        inputs = [draw(*shape, dtype=hidden.dtype) / 4 for shape in shapes]
        return Trial(
            inputs,
            lambda hidden, weight, bias=None: _CrossEntropy.apply(hidden, weight, bias, ids),  # type: ignore[arg-type]
            lambda hidden, *head: F.cross_entropy(F.linear(hidden, *head), ids, reduction="sum"),
        )

    _require("cross_entropy", hidden, (bias is None,), trial)
    ids = targets.flatten()
    outside = ((ids < 0) & (ids != NO_TARGET)) | (ids >= weight.shape[0])  # Liger would read beyond the logits
    loss = _CrossEntropy.apply(hidden.flatten(0, -2), weight, bias, ids.masked_fill(outside, NO_TARGET))
    return loss.masked_fill(outside.any(), float("nan"))  # type: ignore[union-attr]


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    # "gemma" computes all of it in float32. The gradient of y may be another layer's too: it is not overwritten.
    return _call(
        "rms_norm", "LigerRMSNormFunction", x, weight, eps=eps, offset=offset, casting_mode="gemma", in_place=False
    )


class _SwiGLU(torch.autograd.Function):
    """Liger's backward writes the gradients over gate and up, which may be other layers' too: it gets copies."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return import_module("liger_kernel.ops.swiglu").swiglu_forward(gate, up)[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.clone() for x in ctx.saved_tensors)
        return import_module("liger_kernel.ops.swiglu").swiglu_backward(gate, up, dy.contiguous())


class _CrossEntropy(torch.autograd.Function):
    """The sum of losses, and in forward its gradients, which backward multiplies by that of the sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        with torch.enable_grad(), unrecorded():
            rows = hidden.detach().requires_grad_(any(wanted))  # without this one, Liger computes none
            head = weight.detach().requires_grad_(wanted[1])
            offset = None if bias is None else bias.detach().requires_grad_(wanted[2])
            found = _call(
                "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", rows, head, ids, bias=offset,
                ignore_index=NO_TARGET, reduction="sum", accum_dtype=torch.float32,
            )  # fmt: skip
            loss = found[0] if isinstance(found, tuple) else found
            leaves = [x for x, needed in zip((rows, head, offset), wanted, strict=True) if needed and x is not None]
            gradients = iter(torch.autograd.grad(loss, leaves) if leaves else ())
        ctx.save_for_backward(*(next(gradients) if needed else None for needed in wanted))
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they are as large as the weight. Torch refuses a second backward for it.
        return *(None if x is None else x.mul_(dloss) for x in ctx.saved_tensors), None


def _call(module: str, name: str, *tensors: Tensor | None, **options: Any) -> Any:
    """Runs an autograd function of the library; raises TypeError for an option that its version does not have."""
    function = getattr(import_module(f"liger_kernel.ops.{module}"), name)
    bound = _signature(function.forward).bind(None, *tensors, **options)
    bound.apply_defaults()
    return function.apply(*bound.args[1:])


_signature = lru_cache(inspect.signature)


class _Drawing:
    """Normal numbers, the same at every trial, whatever the device."""

    def __init__(self, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(0), device

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)


def _refusal(op: str, why: str) -> ValueError:
    return ValueError(f"kernels.{op} must be one that can run; got 'library': {why}. Use auto")


def _require(op: str, x: Tensor, kind: tuple[object, ...], trial: Callable[[], Trial]) -> None:
    """Raises ValueError where the library cannot run a problem of this kind, with the reason."""
    if x.dtype == torch.float64:
        raise _refusal(op, "Liger-Kernel does not take float64")
    key = (op, str(x.device), x.dtype, *kind)
    if key not in _verdicts:
        with torch.enable_grad(), unrecorded():
            _verdicts[key] = _try(trial)
        if _verdicts[key] is None:
            announce(op, x.device.type, "Liger-Kernel", "which agrees with the definition")
    if (why := _verdicts[key]) is not None:
        raise _refusal(op, why)


def _try(trial: Callable[[], Trial]) -> str | None:
    """What is wrong with the library's results on a small problem."""
    inputs, library, definition = trial()
    try:
        given = _results(library, inputs)
    except ImportError as error:
        return f"Liger-Kernel cannot be imported ({error}). Install it: pip install liger-kernel"
    except Exception as error:
        return f"Liger-Kernel fails here: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    expected = _results(definition, [x.double() for x in inputs])
    names = ["output", *(f"gradient of input {number}" for number in range(1, len(inputs) + 1))]
    for name, got, right in zip(names, given, expected, strict=True):
        error = float((got.double() - right).norm() / right.norm().clamp(min=1e-30))
        if not error < TOLERANCE:
            return f"the {name} of Liger-Kernel is off by {error:.2g} of its norm"
    return None


def _results(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, for a gradient of the output other than 1."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    dout = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype) * 0.7
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]
