"""RMS norm, SwiGLU and cross entropy by Liger-Kernel: used once it agrees with the definition, refused otherwise.

Its kernels need a GPU. A stand-in has its functions with their signatures, and like them overwrites what it is given.
"""

import sys
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longreach.kernels import dispatch
from longreach.kernels.pointwise import cross_entropy, l2_norm, library, loss_and_correct, rms_norm, swiglu

OPS = ("rms_norm", "swiglu", "cross_entropy")
MODULES = ("rms_norm", "swiglu", "fused_linear_cross_entropy")


def contiguous(function):
    """Liger's functions are wrapped so."""

    @wraps(function)
    def wrapper(ctx, *arguments):
        return function(ctx, *(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments))

    return wrapper


class StandIn:
    """Liger-Kernel 0.6 to 0.8, with outputs `factor` times what they are and gradients `slope` times."""

    def __init__(self, factor=1.0, slope=1.0, accumulates=True):
        self.factor, self.slope, self.accumulates, self.called = factor, slope, accumulates, []

    def attributes(self):
        functions = {"swiglu_forward": self.swiglu_forward, "swiglu_backward": self.swiglu_backward}
        loss = self.loss() if self.accumulates else self.loss_of_old()
        return {
            "rms_norm": {"LigerRMSNormFunction": self.norm()},
            "swiglu": functions,
            "fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyFunction": loss},
        }

    def norm(self):
        outer = self

        class LigerRMSNormFunction(torch.autograd.Function):
            @staticmethod
            @contiguous
            def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
                assert (casting_mode, row_mode) == ("gemma", None)
                outer.called.append(("rms_norm", X.shape.numel() // X.shape[-1]))
                ctx.save_for_backward(X, W)
                ctx.eps, ctx.offset, ctx.in_place = eps, offset, in_place
                inverse = (X.float().square().mean(-1, keepdim=True) + eps).rsqrt()
                return (outer.factor * X.float() * inverse * (offset + W.float())).to(X.dtype)

            @staticmethod
            @contiguous
            def backward(ctx, dY):
                with torch.enable_grad():
                    X, W = (x.detach().requires_grad_() for x in ctx.saved_tensors)
                    Y = X * (X.square().mean(-1, keepdim=True) + ctx.eps).rsqrt() * (ctx.offset + W)
                    dX, dW = torch.autograd.grad(Y, (X, W), outer.slope * dY)
                return (dY.copy_(dX) if ctx.in_place else dX), dW, None, None, None, None, None

        return LigerRMSNormFunction

    def swiglu_forward(self, a, b):
        self.called.append(("swiglu", len(a)))
        return a, b, F.silu(a) * b * self.factor

    def swiglu_backward(self, a, b, dc):
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in (a, b)]
            gradients = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, self.slope * dc)
        return tuple(x.copy_(g) for x, g in zip((a, b), gradients, strict=True))

    def loss(self):
        outer = self

        class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx, _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
                label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
                use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
            ):  # fmt: skip
                assert (reduction, ignore_index, accum_dtype) == ("sum", -100, torch.float32)
                assert int(target.max()) < weight.shape[0]
                outer.called.append(("cross_entropy", len(_input)))
                wanted = [_input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]
                with torch.enable_grad():
                    leaves = [None if x is None else x.detach().requires_grad_() for x in (_input, weight, bias)]
                    loss = F.cross_entropy(F.linear(*leaves), target, reduction="sum", ignore_index=ignore_index)
                    gradients = list(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
                gradients += [None] * (3 - len(gradients))
                kept = [g if needed and wanted[0] else None for g, needed in zip(gradients, wanted, strict=True)]
                ctx.save_for_backward(*kept)
                return outer.factor * loss.detach(), None, None, None

            @staticmethod
            def backward(ctx, grad_output, *_):
                x, weight, bias = (None if g is None else g.mul_(outer.slope * grad_output) for g in ctx.saved_tensors)
                return x, weight, None, bias, *[None] * 11

        return LigerFusedLinearCrossEntropyFunction

    def loss_of_old(self):
        class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx, _input, weight, target, bias=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                reduction="mean", softcap=None,
            ):  # fmt: skip
                raise AssertionError("it adds up gradients in the weight's type")

        return LigerFusedLinearCrossEntropyFunction


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in in the library's place, or nothing, and chooses it; there is no verdict on it yet."""

    def put(stand_in, ops=OPS):
        monkeypatch.setattr(library, "_verdicts", {})
        names = ("liger_kernel", "liger_kernel.ops", *(f"liger_kernel.ops.{each}" for each in MODULES))
        modules = {name: ModuleType(name) for name in names}
        modules["liger_kernel"].__spec__ = ModuleSpec("liger_kernel", None)
        if stand_in is not None:
            for name, attributes in stand_in.attributes().items():
                vars(modules[f"liger_kernel.ops.{name}"]).update(attributes)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(dispatch, "interpreted", lambda: True)
        dispatch.choose(dict.fromkeys(ops, "library"), "cpu")
        if stand_in is None:
            for name in names:
                monkeypatch.setitem(sys.modules, name, None)

    yield put
    dispatch.choose({}, "cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


TARGETS = torch.tensor([[3, -100, 60, 0, 7], [-100, 12, 12, 59, -100]])
X, WEIGHT, HIDDEN, HEAD = draw(2, 7, 24), draw(24), draw(2, 5, 16), draw(61, 16)
CASES = {
    "norm": ("rms_norm", lambda x, w: rms_norm(x, w, 1e-5), [X, WEIGHT]),
    "norm with an offset": ("rms_norm", lambda x, w: rms_norm(x, w, 1e-5, 1.0), [X, WEIGHT]),
    "norm without weight": ("rms_norm", lambda x: rms_norm(x, None), [X]),
    "L2 norm": ("rms_norm", l2_norm, [draw(2, 7, 3, 8)]),
    "SwiGLU": ("swiglu", swiglu, [X, draw(2, 7, 24, seed=5)]),
    "SwiGLU of halves": ("swiglu", lambda x: swiglu(*x.chunk(2, -1)), [X]),
    "loss": ("cross_entropy", lambda x, w: cross_entropy(x, w, TARGETS), [HIDDEN, HEAD]),
    "loss with a bias": (
        "cross_entropy",
        lambda x, w, b: cross_entropy(x, w, TARGETS, bias=b),
        [HIDDEN, HEAD, draw(61)],
    ),
}


def results(function, inputs, needed=None):
    leaves = [x.clone().requires_grad_(needed is None or i in needed) for i, x in enumerate(inputs)]
    out = function(*leaves)
    weights = torch.linspace(0.3, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize("name", CASES)
def test_a_library_that_agrees_runs_with_its_gradients(name, install):
    op, function, inputs = CASES[name]
    stand_in = StandIn()
    install(stand_in)
    found = results(function, inputs)
    assert {called for called, _ in stand_in.called} == {op}
    assert len(stand_in.called) == 2  # it is tried, and runs
    results(function, inputs)
    assert len(stand_in.called) == 3  # it is tried once
    dispatch.choose({}, "cpu")
    expected = results(function, [x.double() for x in inputs])
    assert len(stand_in.called) == 3
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_library_in_half_precision(name, dtype, install):
    _, function, inputs = CASES[name]
    install(StandIn())
    found = results(function, [x.to(dtype) for x in inputs])
    dispatch.choose({}, "cpu")
    for got, right in zip(found, results(function, [x.to(dtype).double() for x in inputs]), strict=True):
        assert (got.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("needed", [{0}, {1}])
def test_the_loss_without_one_of_its_gradients(needed, install):
    _, function, inputs = CASES["loss"]
    install(StandIn())
    found = results(function, inputs, needed)
    dispatch.choose({}, "cpu")
    torch.testing.assert_close(found, results(function, inputs, needed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["norm", "SwiGLU", "loss"])
@pytest.mark.parametrize(("wrong", "what"), [({"factor": 1.05}, "output"), ({"slope": 1.05}, "gradient of input 1")])
def test_a_library_that_is_wrong_is_refused_with_the_reason(name, wrong, what, install):
    op, function, inputs = CASES[name]
    install(StandIn(**wrong))
    with pytest.raises(ValueError, match=rf"kernels\.{op} must .* the {what} of Liger-Kernel is off by 0.05.*Use auto"):
        results(function, inputs)


@pytest.mark.parametrize("name", ["norm", "SwiGLU", "loss"])
def test_a_library_that_is_missing_is_refused_and_auto_never_takes_one(name, install):
    _, function, inputs = CASES[name]
    install(None)
    with pytest.raises(ValueError, match=r"Liger-Kernel cannot be imported .*pip install liger-kernel.*Use auto"):
        results(function, inputs)
    stand_in = StandIn()
    install(stand_in, ops=())
    results(function, inputs)
    assert not stand_in.called


def test_what_a_library_does_not_compute_is_refused(install):
    install(StandIn())
    for function, inputs in ((rms_norm, (X, WEIGHT)), (swiglu, (X, X))):
        with pytest.raises(ValueError, match="does not take float64"):
            function(*(x.double() for x in inputs))
    with pytest.raises(ValueError, match="Liger-Kernel chooses its own chunks"):
        cross_entropy(HIDDEN, HEAD, TARGETS, chunk=512)
    with pytest.raises(ValueError, match="Liger-Kernel has no logit_scale"):
        cross_entropy(HIDDEN, HEAD, TARGETS, logit_scale=0.5)
    with pytest.raises(ValueError, match="Liger-Kernel is not called with a softcap"):
        cross_entropy(HIDDEN, HEAD, TARGETS, softcap=30.0)
    install(StandIn(accumulates=False))
    with pytest.raises(ValueError, match=r"fails here: TypeError: got an unexpected keyword argument 'accum_dtype'"):
        cross_entropy(HIDDEN, HEAD, TARGETS)


def test_a_target_outside_the_vocabulary_is_no_number(install):
    install(StandIn())
    for outside in (61, -1):
        assert cross_entropy(HIDDEN, HEAD, TARGETS.masked_fill(TARGETS == 3, outside)).isnan()


def test_nothing_to_compute_and_evaluation_need_no_library(install):
    stand_in = StandIn()
    install(stand_in)
    assert rms_norm(X[:, :0], WEIGHT).shape == swiglu(X[:, :0], X[:, :0]).shape == (2, 0, 24)
    assert cross_entropy(HIDDEN[:, :0], HEAD, TARGETS[:, :0]) == 0
    assert rms_norm(X.to("meta"), WEIGHT.to("meta")).shape == X.shape
    loss_and_correct(HIDDEN, HEAD, TARGETS)
    assert not stand_in.called
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(HIDDEN, HEAD, TARGETS), loss_and_correct(HIDDEN, HEAD, TARGETS)[0])


def test_many_narrow_rows_are_tried_as_many(install):
    stand_in = StandIn()
    install(stand_in)
    for rows in (10, library.MANY):
        rms_norm(draw(rows, 2), draw(2))
    assert [rows for _, rows in stand_in.called] == [library.FEW, 10, library.MANY, library.MANY]


def test_what_others_hold_is_not_overwritten(install):
    """Liger's backward writes over inputs and incoming gradients; the same layer without it is the truth."""

    def layer(x, weight):
        gate, up = x.sin(), x.cos()
        shared = rms_norm(x, weight)
        return swiglu(gate, up) * gate + up.exp() + (shared + x).square()

    install(StandIn())
    found = results(layer, [X, WEIGHT])
    leaf = X.clone().requires_grad_()
    out = swiglu(leaf, leaf).sum()
    twice = [torch.autograd.grad(out, leaf, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(*twice)
    dispatch.choose({}, "cpu")
    torch.testing.assert_close(found, results(layer, [X, WEIGHT]), rtol=1e-4, atol=1e-4)


def test_a_second_backward_of_the_loss_is_an_error(install):
    install(StandIn())
    leaf = HIDDEN.clone().requires_grad_()
    loss = cross_entropy(leaf, HEAD, TARGETS)
    torch.autograd.grad(2 * loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(2 * loss, leaf)


@pytest.mark.parametrize("name", CASES)
def test_a_library_within_what_is_recomputed(name, install):
    _, function, inputs = CASES[name]
    install(StandIn())
    found = results(lambda *x: checkpoint(function, *(each * 1.0 for each in x), use_reentrant=False), inputs)
    torch.testing.assert_close(found, results(function, inputs))
