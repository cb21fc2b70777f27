"""Lines of metrics of several steps whose numbers are read at once."""

import pytest
import torch

from longreach.trainer.run import records
from longreach.trainer.run.metrics import Work
from longreach.trainer.run.records import Records, TakenStep

WORK = Work(targets=8, tokens=10, places=20, flops=100, heaviest=3.0, mean=2.0)


def taken(step: int, norm: float = 0.5, **auxiliary: float) -> TakenStep:
    losses = torch.tensor([[4.0 * step, 0.5, 100.0], [8.0, 1.0 * step, 200.0 + step]], dtype=torch.float64)
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in auxiliary.items()}
    return TakenStep(step, 10 * step, 0.1 * step, losses, norm, scalars, WORK)


def test_each_step_has_its_line_and_the_mean_of_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    kept = Records(peak=75.0)
    for step in (1, 2):
        with kept.timing():
            pass
        kept.add(taken(step, z=float(step)))
    first, second = kept.read()  # (1 + 3 + 2) / 2 seconds each: the wait for the device counts
    assert first == {
        "step": 1, "tokens": 10, "loss": 1.5, "grad_norm": 0.5, "learning_rate": 0.1, "tokens_per_second": 10 / 3,
        "peak_memory_bytes": 201, "seconds": 3.0,
        "communication_seconds": 1.0, "flops_per_second": 100.0, "mfu": 100 / 2 / 75, "padding": 0.5,
        "attention_imbalance": 1.5, "auxiliary_z": 1.0,
    }  # fmt: skip
    assert (second["step"], second["loss"], second["auxiliary_z"]) == (2, 2.0, 2.0)
    assert kept.read() == []


def test_norms_may_be_on_the_host_or_on_the_device() -> None:
    kept = Records(peak=None)
    kept.add(taken(1, norm=0.25))
    kept.add(taken(2, norm=torch.tensor(0.5), z=7.0))  # type: ignore[arg-type]
    kept.add(taken(3, norm=float("inf")))
    first, second, third = kept.read()
    assert [line["grad_norm"] for line in (first, second, third)] == [0.25, 0.5, float("inf")]
    assert second["auxiliary_z"] == 7.0
    assert "auxiliary_z" not in first
    assert first["mfu"] is None


def test_what_is_said_once_is_in_the_next_line_alone() -> None:
    kept = Records(peak=None)
    kept.once = {"memory": {"parameters": 7}}
    for step in (1, 2):
        kept.add(taken(step))
    first, second = kept.read()
    kept.add(taken(3))
    assert first["memory"] == {"parameters": 7}
    assert not any("memory" in line for line in (second, *kept.read()))
