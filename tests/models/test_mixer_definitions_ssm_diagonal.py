"""S4D and H3 against the papers' recurrence and convolution in complex numbers, outputs and every gradient."""

import math

import pytest
import torch
from model_presets import randomise
from oracles import assert_agrees, draw, whole, with_gradients
from torch.nn import functional as F

from longreach.models.mixers.state_space.h3 import H3
from longreach.models.mixers.state_space.s4d import S4D

WIDTH, BATCH, LENGTH = 12, 2, 37
X = draw(BATCH, LENGTH, WIDTH)


def made(mixer):
    mixer = mixer.double()
    randomise(mixer)
    with torch.no_grad():
        mixer.model.log_step.sub_(1.5)
    return mixer


def discrete(model):
    """(step of the state, factor of the input) `[H, N / 2]`, complex."""
    step = model.log_step.exp()[:, None]
    a = torch.complex(-model.A_log.exp(), model.A_imaginary)
    if model.discretisation == "zoh":
        return (step * a).exp(), ((step * a).exp() - 1) / a
    return (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)


def by_steps(model, x):
    """h_t = Ā h_{t−1} + B̄ x_t, y_t = 2 Re(C h_t): `[B, T, H, P]` to the same."""
    (factor, entering), c = discrete(model), torch.view_as_complex(model.C)
    h, outputs = torch.zeros((), dtype=factor.dtype), []
    for t in range(x.shape[1]):
        h = factor[..., None] * h + entering[..., None] * x[:, t, :, None]
        outputs.append(2 * (c[..., None] * h).real.sum(2))
    return torch.stack(outputs, 1)


def by_convolution(model, x):
    """The convolution with K_s = 2 Re Σ_n C B̄ Ā^s, by FFT."""
    (factor, entering), c, length = discrete(model), torch.view_as_complex(model.C), x.shape[1]
    times = torch.arange(length, dtype=torch.float64)
    kernel = 2 * ((c * entering)[..., None] * factor[..., None] ** times).real.sum(1)
    spectrum = torch.fft.rfft(kernel, n=2 * length)[:, None] * torch.fft.rfft(x.permute(0, 2, 3, 1), n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].permute(0, 3, 1, 2)


ORACLES = {"plain recurrence of the paper": by_steps, "convolution of the paper, by FFT": by_convolution}


def assert_is(name, oracle, mixer, other):
    parameters = list(mixer.parameters())
    actual = with_gradients(lambda x: mixer(x, whole(BATCH, LENGTH)), X, parameters)
    assert_agrees(name, oracle, actual, with_gradients(other, X, parameters))


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_s4d_is_that_of_the_paper(discretisation, oracle):
    mixer = made(S4D(width=WIDTH, state=10, discretisation=discretisation))

    def other(x):
        hidden = F.gelu(ORACLES[oracle](mixer.model, x.unsqueeze(-1)).squeeze(-1) + mixer.D * x)
        return mixer.output(hidden) * torch.sigmoid(mixer.gate(hidden))

    assert_is("s4d", oracle, mixer, other)


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("head_dim", [1, 3])
def test_h3_is_that_of_the_paper(head_dim, oracle):
    mixer = made(H3(width=WIDTH, head_dim=head_dim, state=10))

    def other(x):
        q, k, v = mixer.query(x), mixer.key(x), mixer.value(x)
        padded = F.pad(k, (0, 0, 9, 0))  # the shift SSM holds the last 10 keys
        k = sum(padded[:, t : t + LENGTH] * mixer.shift.weight[:, t] for t in range(10)) + mixer.E * k
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (q, k, v))
        outer = torch.einsum("bthk,bthv->bthkv", k, v)
        y = ORACLES[oracle](mixer.model, outer.flatten(-2)).view_as(outer) + mixer.D[:, None, None] * outer
        return mixer.output(torch.einsum("bthk,bthkv->bthv", q, y).flatten(-2))

    assert_is("h3", oracle, mixer, other)


def test_s4d_starts_as_published():
    model = S4D(width=4096, state=8, initial="inv").model
    values = {name: torch.empty_like(parameter) for name, parameter in model.named_parameters()}
    for name, value in values.items():
        assert model.initialise_parameter(name, value, torch.Generator().manual_seed(0))
    torch.testing.assert_close(values["A_log"].exp(), torch.full((4096, 4), 0.5))
    n = torch.arange(4)
    expected = 8 / math.pi * (8 / (2 * n + 1) - 1)
    torch.testing.assert_close(values["A_imaginary"], expected.expand(4096, -1))
    model.initial = "lin"
    assert model.initialise_parameter("A_imaginary", values["A_imaginary"], torch.Generator())
    torch.testing.assert_close(values["A_imaginary"], (math.pi * n).expand(4096, -1))
    steps = values["log_step"].exp()
    assert (steps.min() >= 1e-3 * 0.99) & (steps.max() <= 0.1 * 1.01)
    assert values["C"].square().sum(-1).mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"state": 7}, "state"), ({"initial": "legs"}, "initial"), ({"discretisation": "dss"}, "discretisation"),
     ({"step_range": (0.1, 0.001)}, "step_range")],
)  # fmt: skip
@pytest.mark.parametrize("mixer", [S4D, H3])
def test_wrong_settings_are_named(mixer, settings, named):
    with pytest.raises(ValueError, match=named):
        mixer(width=WIDTH, **settings)


def test_wrong_heads_of_h3_are_named():
    with pytest.raises(ValueError, match="head_dim"):
        H3(width=WIDTH, head_dim=5)
