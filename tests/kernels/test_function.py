"""Outputs of autograd functions where torch's compiler would lose the gradients of some: see `LOSES_GRADIENTS`."""

import pytest
import torch

from longreach.kernels.operation import own_outputs


@pytest.mark.parametrize("compiling", [False, True])
def test_outputs_are_copies_where_torch_compiles(monkeypatch, compiling):
    x = torch.randn(3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    outputs = own_outputs(lambda ctx, y: y.mul_(2.0))(None, x), *own_outputs(lambda ctx, y: (y.float(), None))(None, x)
    assert outputs[2] is None
    for y in outputs[:2]:
        assert torch.equal(y, x)
        assert (y is not x) == compiling


def test_a_graph_keeps_the_gradients_of_outputs_that_were_written_over():
    class Doubled(torch.autograd.Function):
        @staticmethod
        @own_outputs
        def forward(ctx, x):
            return (x + 0.0).mul_(2.0)

        @staticmethod
        def backward(ctx, dy):
            return 2.0 * dy

    x = torch.randn(3, requires_grad=True)
    torch.compile(lambda x: Doubled.apply(1.0 * x).sin().sum(), backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, 2.0 * torch.cos(2.0 * x.detach()))
