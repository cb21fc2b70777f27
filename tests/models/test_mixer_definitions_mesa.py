"""MesaNet's layer against exact solutions of the paper's recurrence, and around the published code of its op."""

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.mixers.delta.mesa_net import MesaNet

WIDTH, HEADS, BATCH, LENGTH = 24, 3, 2, 37
X = draw(BATCH, LENGTH, WIDTH)


def layer(mixer, op):
    """The layer as flash-linear-attention has it, around `op(q, k, v, g, lamb, beta)`."""

    def convolved(x, weight):
        taps = weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        return F.silu(sum(padded[:, back : back + LENGTH] * weight[:, back] for back in range(taps)))

    def call(x):
        parts = F.linear(x, mixer.query.weight), F.linear(x, mixer.key.weight)
        q, k = map(convolved, parts, mixer.conv.weight.chunk(2))
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (q, k, F.linear(x, mixer.value.weight)))
        q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
        decay, beta = (F.linear(x, gate.weight, gate.bias) for gate in (mixer.decay, mixer.beta))
        out = op(q, k, v, F.logsigmoid(decay), 0.25 + F.softplus(mixer.regulariser), beta.sigmoid())
        normed = out * (out.square().mean(-1, keepdim=True) + mixer.norm.eps).rsqrt() * mixer.norm.weight
        if mixer.gate is not None:
            normed = normed * F.silu(F.linear(x, mixer.gate.weight)).view_as(normed)
        return F.linear(normed.flatten(-2), mixer.output.weight)

    return call


def made(**settings):
    mixer = MesaNet(width=WIDTH, heads=HEADS, **settings).double()
    randomise(mixer)
    return mixer


def exact(q, k, v, g, lamb, beta):
    """The recurrences of the paper, and its linear systems solved."""
    covariance, memory = (q.new_zeros(BATCH, HEADS, k.shape[-1], x.shape[-1]) for x in (k, v))
    outputs = []
    for t in range(LENGTH):
        decay, weighted = g[:, t, :, None, None].exp(), beta[:, t, :, None] * k[:, t]
        covariance = decay * covariance + weighted[..., None] * k[:, t, :, None, :]
        memory = decay * memory + weighted[..., None] * v[:, t, :, None, :]
        solved = torch.linalg.solve(covariance + torch.diag_embed(lamb), q[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", solved, memory))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("settings", [{}, {"key_dim": 5, "value_dim": 7, "output_gate": True}])
def test_mesa_net_is_the_recurrence_of_the_paper(settings):
    mixer = made(**settings)
    parameters = list(mixer.parameters())
    ours = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    theirs = with_gradients(layer(mixer, exact), X, parameters)
    assert_agrees("mesa_net", "plain recurrence of the paper", ours, theirs)


def test_mesa_net_is_the_layer_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.mesa_net.naive", reason="needs flash-linear-attention")
    mixer = made()
    parameters = list(mixer.parameters())
    ours = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    call = layer(mixer, lambda *inputs: naive.naive_mesa_net_exact(*inputs)[0].double())  # it computes in float32
    oracle = "flash-linear-attention, naive_mesa_net_exact"
    assert_agrees("mesa_net", oracle, ours, with_gradients(call, X, parameters), tolerance=1e-4)


def test_mesa_net_starts_with_the_identity():
    mixer = MesaNet(width=WIDTH, heads=HEADS)
    regulariser = torch.empty(HEADS, 8)
    assert mixer.initialise_parameter("regulariser", regulariser, torch.Generator())
    torch.testing.assert_close(0.25 + F.softplus(regulariser), torch.ones(HEADS, 8))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        MesaNet(width=WIDTH, heads=HEADS, iterations=0)
    with pytest.raises(ValueError, match="heads must divide width=24; got 5"):
        MesaNet(width=WIDTH, heads=5)
