"""Mamba-2 and mLSTM against the modules of transformers, outputs and gradients."""

import pytest
import torch
from definitions import definitions_of
from oracles import assert_agrees

from longreach.kernels.documents import Documents
from longreach.models.mixers.linear.mlstm import MLSTM
from longreach.models.mixers.state_space.log_linear_mamba2 import LogLinearMamba2
from longreach.models.mixers.state_space.mamba2 import Mamba2
from longreach.parallel.sequence import Sequence
from longreach.trainer.optimizers.groups import parameter_groups

WIDTH, LENGTH = 32, 75


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module):
    """Values that leave nothing near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)


def assert_same_with_gradients(mixer, oracle, ours, theirs, gradients, tolerance=1e-3):
    """Outputs, and gradients of the input and of all parameters; theirs computes in float32 inside.

    gradients: theirs of our names, called after their backward.
    """
    x, dout = draw(2, LENGTH, WIDTH), draw(2, LENGTH, WIDTH, seed=9)
    found = []
    for call in (lambda x: ours(x, Sequence.single(Documents.whole(2, LENGTH))), theirs):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out.backward(dout)
        found.append([out.detach(), leaf.grad])
    parameters, expected = dict(ours.named_parameters()), gradients()
    assert set(expected) == set(parameters)
    found[0] += [parameters[name].grad for name in expected]
    found[1] += [right.view_as(parameters[name]) for name, right in expected.items()]
    assert_agrees(mixer, oracle, *found, tolerance=tolerance)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [(0.0, None), (0.5, 1.5)], ids=["unlimited", "limited"])
def test_mamba2_is_the_one_in_transformers(monkeypatch, groups, limit):
    modeling = definitions_of("mamba2")
    config = modeling.Mamba2Config(
        hidden_size=WIDTH, num_heads=8, head_dim=8, state_size=6, n_groups=groups, expand=2, conv_kernel=4,
        chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-5,
        time_step_limit=(limit[0], limit[1] or float("inf")),
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, 0).double().eval()
    fill(theirs)
    ours = Mamba2(width=WIDTH, head_dim=8, state=6, groups=groups, step_limit=limit).double()
    sizes = {"gate": 64, "value": 64, "key": 6 * groups, "query": 6 * groups, "step": 8}

    def renamed(of):
        """Their parameters, or what `of` makes of them, by our names."""
        parts = of(theirs.in_proj.weight).split(list(sizes.values()))
        named = {f"{name}.weight": part for name, part in zip(sizes, parts, strict=True)}
        return named | {
            "conv.weight": of(theirs.conv1d.weight).squeeze(1), "conv.bias": of(theirs.conv1d.bias),
            "dt_bias": of(theirs.dt_bias), "A_log": of(theirs.A_log), "D": of(theirs.D),
            "norm.weight": of(theirs.norm.weight), "output.weight": of(theirs.out_proj.weight),
        }  # fmt: skip

    ours.load_state_dict(renamed(lambda parameter: parameter.detach()))
    name = "transformers, Mamba2Mixer"
    assert_same_with_gradients("mamba2", name, ours, theirs, lambda: renamed(lambda parameter: parameter.grad))


def test_mlstm_is_the_layer_of_xlstm_in_transformers():
    modeling = definitions_of("xlstm")
    config = modeling.xLSTMConfig(hidden_size=WIDTH, num_heads=4, qk_dim_factor=0.5, mode="train", chunk_size=25)
    theirs = modeling.xLSTMLayer(config).double()
    fill(theirs)
    ours = MLSTM(width=WIDTH, heads=4, norm_eps=config.norm_eps).double()
    names = {
        "query.weight": "q.weight", "key.weight": "k.weight", "value.weight": "v.weight",
        "input_gate.weight": "igate_preact.weight", "input_gate.bias": "igate_preact.bias",
        "forget_gate.weight": "fgate_preact.weight", "forget_gate.bias": "fgate_preact.bias",
        "gate.weight": "ogate_preact.weight", "norm.weight": "multihead_norm.weight",
        "output.weight": "out_proj.weight",
    }  # fmt: skip
    ours.load_state_dict({name: theirs.get_parameter(other).detach() for name, other in names.items()})
    assert_same_with_gradients(
        "mlstm",
        "transformers, xLSTMLayer",
        ours,
        lambda x: theirs(x)[0],
        lambda: {name: theirs.get_parameter(other).grad for name, other in names.items()},
    )


def test_mamba2_starts_as_published():
    mixer = Mamba2(width=64, head_dim=8)
    values = {name: torch.empty(16) for name in ("A_log", "D", "dt_bias")}
    for name, value in values.items():
        assert mixer.initialise_parameter(name, value, torch.Generator().manual_seed(0))
    torch.testing.assert_close(values["A_log"].exp(), torch.arange(1.0, 17.0))
    assert (values["D"] == 1).all()
    steps = torch.nn.functional.softplus(values["dt_bias"])
    assert ((steps >= 1e-3 * 0.99) & (steps <= 0.1 * 1.01)).all()


@pytest.mark.parametrize("mixer", [Mamba2, LogLinearMamba2])
def test_the_skip_starts_where_it_is_set(mixer):
    skip = torch.empty(8)
    assert mixer(width=32, head_dim=8, initial_skip=0.25).initialise_parameter("D", skip, torch.Generator())
    assert (skip == 0.25).all()


def test_mlstm_starts_with_closed_input_gates():
    mixer, generator = MLSTM(width=64, heads=4), torch.Generator()
    bias, weight = torch.empty(4), torch.ones(4, 64)
    assert mixer.initialise_parameter("input_gate.bias", bias, generator)
    assert (bias == -10).all()
    assert mixer.initialise_parameter("forget_gate.bias", bias, generator)
    torch.testing.assert_close(bias, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert mixer.initialise_parameter("forget_gate.weight", weight, generator)
    assert not weight.any()
    assert not mixer.initialise_parameter("query.weight", weight, generator)


def test_rates_steps_and_skips_do_not_decay():
    mixer = Mamba2(width=32, head_dim=8)
    decaying = {id(parameter) for parameter in parameter_groups(mixer, 0.1)[0]["params"]}
    assert not {id(x) for x in (mixer.A_log, mixer.dt_bias, mixer.D, mixer.norm.weight)} & decaying
    assert id(mixer.gate.weight) in decaying


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"head_dim": 24}, "head_dim"), ({"head_dim": 8, "groups": 3}, "groups"), ({"step_range": (0, 1)}, "step_range")],
)
def test_wrong_settings_of_mamba2_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Mamba2(width=32, **settings)


def test_wrong_settings_of_mlstm_are_named():
    with pytest.raises(ValueError, match="gate_cap"):
        MLSTM(width=32, heads=4, gate_cap=0.0)
