"""Mamba-3 against its recurrence, token by token, with the state that the paper writes; outputs and every gradient."""

import math

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.layers.phases import cumulative_phases
from longreach.models.mixers.state_space.mamba3 import Mamba3

WIDTH, BATCH, LENGTH = 16, 2, 29
X = draw(BATCH, LENGTH, WIDTH)


def rotated(x, phase):
    """The first channels in neighbouring pairs as complex numbers, times e^{i phase}; phase `[B, H, A]`."""
    count = 2 * phase.shape[-1]
    pairs = torch.view_as_complex(x[..., :count].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2)
    return torch.cat([turned, x[..., count:]], dim=-1)


def by_steps(mixer, u):
    """The paper's recurrence: one state per head, into which all inputs of a token go and which all outputs read."""
    heads, rank, groups = mixer.heads, mixer.rank, mixer.groups

    def normed(x, norm, bias):
        x = x.unflatten(-1, (rank, groups, -1))
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        return torch.stack([x[..., h * groups // heads, :] for h in range(heads)], dim=-2) + bias  # [B, T, R, H, N]

    b, c = (
        normed(mixer.key(u), mixer.key_norm, mixer.key_bias),
        normed(mixer.query(u), mixer.query_norm, mixer.query_bias),
    )
    x, z = (project(u).unflatten(-1, (heads, -1)) for project in (mixer.value, mixer.gate))
    delta = F.softplus(mixer.step(u) + mixer.dt_bias)
    decay = torch.exp(-delta * F.softplus(mixer.rate(u)).clamp(min=1e-4))
    share, angle = torch.sigmoid(mixer.trapezoid(u)), math.pi * torch.tanh(mixer.turn(u))
    one = torch.ones(rank, heads, mixer.head_dim, dtype=u.dtype)
    inlets, gates, outlets = (one if each is None else each for each in (mixer.inlets, mixer.gates, mixer.outlets))
    state = torch.zeros(BATCH, heads, mixer.state, mixer.head_dim, dtype=u.dtype)
    before, phase, outputs = torch.zeros_like(state), 0.0, []
    for t in range(u.shape[1]):
        phase = phase + delta[:, t, :, None] * angle[:, t, None]
        x_t = x[:, t, None] * inlets
        entering = sum(rotated(b[:, t, r], phase)[..., None] * x_t[:, r, :, None] for r in range(rank))
        step, lam, a = (each[:, t, :, None, None] for each in (delta, share, decay))
        state = a * state + (1 - lam) * step * a * before + lam * step * entering
        before = entering
        y = torch.stack([(rotated(c[:, t, r], phase)[..., None] * state).sum(-2) for r in range(rank)], dim=1)
        y = (y + mixer.D[:, None] * x_t) * F.silu(z[:, t, None] * gates)
        outputs.append((y * outlets).sum(1).flatten(-2))
    return mixer.output(torch.stack(outputs, 1))


@pytest.mark.parametrize(
    "settings",
    [{}, {"groups": 2, "rope_fraction": 1.0}, {"rank": 3, "groups": 2, "state": 10, "rope_fraction": 0.4}],
    ids=["one input", "groups", "three inputs"],
)
def test_mamba3_is_the_recurrence_of_the_paper(settings):
    mixer = Mamba3(width=WIDTH, **{"head_dim": 8, "state": 12, **settings}).double()
    randomise(mixer)
    parameters = list(mixer.parameters())
    actual = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    expected = with_gradients(lambda x: by_steps(mixer, x), X, parameters)
    assert_agrees("mamba3", "plain recurrence of the paper", actual, expected)


def test_phases_stay_exact_over_long_documents():
    angles = 3 * torch.rand(1, 20_000, 1, 2, generator=torch.Generator().manual_seed(0))
    expected = angles.double().cumsum(1)
    error = (cumulative_phases(angles, whole(1, 20_000)).double() - expected).cos() - 1
    assert error.abs().max() < 1e-12


def test_mamba3_starts_as_published():
    mixer = Mamba3(width=64, head_dim=8, rank=4)
    values = {name: torch.empty_like(parameter) for name, parameter in mixer.named_parameters() if parameter.dim() != 2}
    given = {name for name, value in values.items() if mixer.initialise_parameter(name, value, torch.Generator())}
    assert given == {"inlets", "gates", "outlets", "key_bias", "query_bias", "D", "dt_bias"}
    assert {name: value.flatten()[0].item() for name, value in values.items() if name in given - {"dt_bias"}} == {
        "inlets": 0.25, "gates": 1, "outlets": 0.25, "key_bias": 1, "query_bias": 1, "D": 1
    }  # fmt: skip
    steps = F.softplus(values["dt_bias"])
    assert ((steps >= 1e-3 * 0.99) & (steps <= 0.1 * 1.01)).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"head_dim": 24}, "head_dim"),
        ({"groups": 3}, "groups"),
        ({"rank": 0}, "rank"),
        ({"rope_fraction": 0.0}, "rope"),
    ],
)
def test_wrong_settings_of_mamba3_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Mamba3(width=32, **{"head_dim": 8, **settings})
