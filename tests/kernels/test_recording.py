"""Ops that are differentiated by autograd are so in compiled graphs too."""

import pytest
import torch
from torch import Tensor

from longreach.kernels.operation import recording


def slope_of_square(x: Tensor) -> Tensor:
    """2 x, as a backward finds it."""
    with recording():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(leaf.square().sum(), leaf)[0].clone()


def test_autograd_records_where_torch_has_switched_it_off():
    x = torch.arange(3.0)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        assert torch.equal(slope_of_square(x), 2 * x)
        assert not torch.ones(1, requires_grad=True).square().requires_grad  # it is off again


@pytest.mark.slow
def test_autograd_records_in_an_op_of_a_compiled_graph():
    op = torch.library.custom_op("longreach_tests::slope_of_square", slope_of_square, mutates_args=())
    op.register_fake(torch.empty_like)
    x = torch.arange(3.0)
    assert torch.equal(torch.compile(op, backend="aot_eager", fullgraph=True)(x), 2 * x)
