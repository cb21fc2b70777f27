"""The guard against bad steps: what it lets by is not changed in a bit, and the host reads nothing for it."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.parallel.mesh import Mesh
from longreach.trainer.faults.guard import Guard
from longreach.trainer.settings import TrainerSettings


def guard(deviations: float = 0.0, window: int | None = None) -> Guard:
    return Guard(deviations, window, Mesh(), torch.device("cpu"))


def gradients(by: Guard, loss: float) -> list[float]:
    """Of a loss and an auxiliary one, by what they are computed from, at a step's only micro-batch with ten targets."""
    x = torch.tensor([loss, 0.25], requires_grad=True)
    checked, auxiliary = by.checked(x[0] * 3, x[1] * 0.7, (x[0] * 3).double().detach(), 10)
    assert auxiliary is not None
    (checked / 10 + auxiliary).backward()
    assert x.grad is not None
    return x.grad.tolist()


@pytest.mark.parametrize("loss", [0.1, 3e38 / 3, -7.0, 0.0])
def test_a_finite_loss_keeps_every_bit_of_its_gradient(loss: float) -> None:
    x = torch.tensor([loss, 0.25], requires_grad=True)
    (x[0] * 3 / 10 + x[1] * 0.7).backward()
    assert x.grad is not None
    assert gradients(guard(), loss) == x.grad.tolist()


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_gradient_that_is(loss: float) -> None:
    assert all(map(math.isnan, gradients(guard(), loss)))


def is_spike(by: Guard, mean: float) -> bool:
    """A step of this mean loss, which is taken unless it is one."""
    bad = math.isnan(gradients(by, mean * 10 / 3)[0])
    assert (by.spike() is not None) == bad
    if not bad:
        by.taken()
    return bad


def test_a_spike_is_above_mean_and_deviations_of_the_steps_that_were_taken() -> None:
    losses = np.random.default_rng(3).normal(4.0, 0.2, 60)
    losses[[5, 23, 24, 41]] += 3.0  # the first of them while there are too few to tell
    mine, taken, expected, got = guard(4.0, 8), [], [], []
    for place, loss in enumerate(losses):
        window = taken[-8:]
        expected.append(len(window) == 8 and loss > np.mean(window) + 4.0 * np.std(window, ddof=1))
        got.append(is_spike(mine, loss))
        if not got[-1]:
            taken.append(loss)
        if place % 7 == 0:  # through a checkpoint
            state, mine = json.loads(json.dumps(mine.state())), guard(4.0, 8)
            mine.resume(state)
    assert got == expected
    assert [place for place, spike in enumerate(got) if spike] == [23, 24, 41]


def test_another_window_and_another_stage_begin_to_measure_anew() -> None:
    first, second = guard(4.0, 4), guard(4.0, 6)
    for loss in (1.0, 1.1, 0.9, 1.0):
        assert not is_spike(first, loss)
    second.resume(first.state())
    assert not is_spike(second, 50.0)
    assert is_spike(first, 50.0)
    first.forget()
    assert not is_spike(first, 50.0)
    assert guard().state() == {}


class NothingIsRead(TorchDispatchMode):
    """Fails where the host asks for a value of a tensor: on a GPU it would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing_to_decide() -> None:
    mine, loss = guard(4.0, 2), torch.tensor(3.0)
    with NothingIsRead():
        for _ in range(4):
            mine.checked(loss, None, loss.double(), 10)
            mine.taken()
    with NothingIsRead(), pytest.raises(AssertionError, match="a value is read"):
        mine.spike()


def test_a_window_without_spikes_has_no_effect_and_is_refused() -> None:
    TrainerSettings(spike_deviations=6, spike_window=50).check()
    with pytest.raises(ValueError, match=r"trainer\.spike_window must be left out without trainer\.spike_deviations"):
        TrainerSettings(spike_window=50).check()
    for settings in (TrainerSettings(max_rollbacks=-1), TrainerSettings(spike_deviations=-1.0)):
        with pytest.raises(ValueError, match="must be at least 0"):
            settings.check()


def test_one_rank_alone_sees_the_loss_of_all() -> None:
    """The total is this rank's; with one rank it is the step's."""
    mine = guard(3.0, 2)
    total: Tensor = torch.tensor(20.0, dtype=torch.float64)
    mine.checked(torch.tensor(20.0), None, total, 10)
    mine.taken()
    assert mine.state()["losses"][0] == 2.0
