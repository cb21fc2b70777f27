"""Mamba against the modules of transformers: outputs and gradients, with and without norms of its parts."""

import math

import pytest
import torch
from definitions import definitions_of
from oracles import assert_agrees

from longreach.kernels.documents import Documents
from longreach.models.mixers.state_space.mamba import Mamba
from longreach.parallel.sequence import Sequence
from longreach.trainer.optimizers.groups import parameter_groups

WIDTH, LENGTH = 32, 45


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module):
    """Values that leave nothing near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)


def parts(theirs, part_norms):
    """Our names, and the tensors of theirs that they stand for, given a function of their parameters."""

    def of(take):
        value, gate = take(theirs.in_proj.weight).chunk(2)
        named = {
            "value.weight": value,
            "gate.weight": gate,
            "conv.weight": take(theirs.conv1d.weight).squeeze(1),
            "conv.bias": take(theirs.conv1d.bias),
            "selection.weight": take(theirs.x_proj.weight),
            "step.weight": take(theirs.dt_proj.weight),
            "dt_bias": take(theirs.dt_proj.bias),
            "A_log": take(theirs.A_log),
            "D": take(theirs.D),
            "output.weight": take(theirs.out_proj.weight),
        }
        if part_norms == "weighted":
            layers = theirs.dt_layernorm, theirs.b_layernorm, theirs.c_layernorm
            named |= {f"norms.{number}.weight": take(layer.weight) for number, layer in enumerate(layers)}
        return named

    return of


def mamba_of(part_norms):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1}
    if part_norms is None:
        modeling = definitions_of("mamba")
        return modeling.MambaMixer(modeling.MambaConfig(**sizes, state_size=6, expand=2, time_step_rank=3), 0)
    if part_norms == "weightless":
        modeling = definitions_of("falcon_mamba")
        config = modeling.FalconMambaConfig(**sizes, state_size=6, expand=2, time_step_rank=3)
        return modeling.FalconMambaMixer(config, 0, initialize_mixer_weights=False)  # which needs what comes after it
    modeling = definitions_of("jamba")
    config = modeling.JambaConfig(
        **sizes, mamba_d_state=6, mamba_expand=2, mamba_dt_rank=3, num_attention_heads=4, num_key_value_heads=2,
        use_mamba_kernels=False,
    )  # fmt: skip
    return modeling.JambaMambaMixer(config, 0)


@pytest.mark.parametrize("part_norms", [None, "weighted", "weightless"])
def test_mamba_is_the_one_in_transformers(part_norms):
    theirs = mamba_of(part_norms).double().eval()
    fill(theirs)
    named = parts(theirs, part_norms)
    ours = Mamba(width=WIDTH, state=6, step_rank=3, part_norms=part_norms, norm_eps=1e-6).double()
    ours.load_state_dict(named(lambda tensor: tensor.detach()))
    x, dout = draw(2, LENGTH, WIDTH), draw(2, LENGTH, WIDTH, seed=9)
    found = []
    for call in (lambda x: ours(x, Sequence.single(Documents.whole(2, LENGTH))), theirs):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(dout)
        found.append([out.detach(), leaf.grad])
    expected = named(lambda tensor: tensor.grad)
    found[0] += [ours.get_parameter(name).grad for name in expected]
    found[1] += expected.values()
    # Theirs computes in float32 inside.
    assert_agrees("mamba", f"transformers, {type(theirs).__name__}", *found, tolerance=1e-5)


def test_steps_start_within_their_range_and_decays_at_the_states_numbers():
    mixer = Mamba(width=WIDTH, state=5, step_range=(1e-3, 1e-1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("dt_bias", "A_log", "D", "step.weight"):
            assert mixer.initialise_parameter(name, mixer.get_parameter(name), generator)
        steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 1e-3 * (1 - 1e-4)
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.4)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 6).expand(2 * WIDTH, -1))
    assert mixer.step.weight.abs().max() <= mixer.step.in_features**-0.5
    assert (mixer.D == 1).all()


def test_weight_decay_leaves_the_logarithms_of_rates_alone():
    mixer = Mamba(width=WIDTH)
    decaying, others = (group["params"] for group in parameter_groups(mixer, 0.1))
    assert not any(parameter is mixer.A_log for parameter in decaying)
    assert any(parameter is mixer.A_log for parameter in others)
    assert any(parameter is mixer.selection.weight for parameter in decaying)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state": 0}, "state must be at least 1; got 0"),
        ({"step_rank": 0}, "step_rank must be at least 1; got 0"),
        ({"expansion": 0}, r"expansion \* width must be at least 1; got 0"),
        ({"step_range": (0.1, 0.01)}, "step_range must be positive and in order"),
        ({"part_norms": "rms"}, "part_norms must be one of None, weighted, weightless; got 'rms'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Mamba(width=WIDTH, **settings)
