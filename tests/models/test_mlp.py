"""MLP against its formula, and what it refuses."""

import pytest
import torch
from oracles import draw, whole

from longreach.models.feed_forward.mlp import MLP

NAMES = {"gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh"), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "squared_relu"])
def test_is_two_matrices_around_an_activation(name, bias):
    layer, x = MLP(width=6, hidden=10, activation=name, bias=bias).double(), draw(2, 3, 6)
    activation = NAMES.get(name, lambda x: x.clamp(min=0) ** 2)
    expected = activation(x @ layer.up.weight.T + (layer.up.bias if bias else 0)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x, whole(2, 3)), expected + (layer.down.bias if bias else 0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"feed_forward\.activation must be one of gelu, .*; got 'tanh'"):
        MLP(width=6, hidden=10, activation="tanh")
    with pytest.raises(ValueError, match=r"feed_forward\.hidden must be at least 1; got 0"):
        MLP(width=6, hidden=0)
