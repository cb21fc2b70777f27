"""Which implementation runs: by device and type, by request, and never in silence."""

import logging

import pytest
import torch

from longreach.kernels import dispatch
from longreach.kernels.delta_rule import DeltaInputs, DeltaRecurrence
from longreach.kernels.dispatch import resolve
from longreach.kernels.documents import Documents
from longreach.kernels.short_conv import reference, token_shift


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_auto_is_triton_on_cuda_but_for_float64(device):
    assert resolve("some_op", "auto", device) == "triton"
    assert resolve("some_op", "auto", device, torch.float64) == "chunked"


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_what_is_asked_for_runs(device):
    assert resolve("some_op", "chunked", device) == "chunked"
    assert resolve("some_op", "reference", device) == "reference"
    assert resolve("some_op", "auto", "cpu") == "chunked"


def test_triton_off_cuda_runs_under_its_interpreter_only(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert resolve("some_op", "triton", "cpu") == "triton"
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert resolve("some_op", "triton", "cuda") == "triton"
    with pytest.raises(ValueError, match="some_op got 'triton', which needs CUDA or Triton's interpreter"):
        resolve("some_op", "triton", "cpu")


def test_what_cannot_run_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="must not be 'triton' for float64 tensors; some_op"):
        resolve("some_op", "triton", "cuda", torch.float64)
    with pytest.raises(
        ValueError, match="backend must be 'auto' or one of triton, chunked, reference, library; got 'flash'"
    ):
        resolve("some_op", "flash", "cpu")


def test_the_choice_is_logged_once_an_op(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, logger="longreach"):
        for _ in range(3):
            resolve("first_op", "auto", "cpu")
        resolve("second_op", "reference", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "first_op on cpu: chunked, chosen for this device",
        "second_op on cpu: reference, by request",
    ]


def test_an_op_without_an_implementation_for_the_device_says_what_it_has():
    assert resolve("mine", "auto", "cpu", offered=("reference",)) == "reference"
    with pytest.raises(ValueError, match=r"one that mine has, triton; got 'auto' on cpu, which is chunked"):
        resolve("mine", "auto", "cpu", offered=("triton",))
    with pytest.raises(ValueError, match="one that mine has, reference; got 'chunked'"):
        resolve("mine", "chunked", "cpu", offered=("reference",))


@pytest.fixture
def chosen():
    yield lambda device="cpu", **choices: dispatch.choose(choices, device)
    dispatch.choose({}, "cpu")


def test_what_auto_means_can_be_chosen_per_op(chosen):
    chosen(first_op="reference")
    assert resolve("first_op", "auto", "cpu") == "reference"
    assert resolve("first_op", "chunked", "cpu") == "chunked"
    assert resolve("first_op", "auto", "meta") == resolve("second_op", "auto", "cpu") == "chunked"
    chosen("cuda", rms_norm="chunked")
    assert resolve("rms_norm", "auto", "cuda") == "chunked"
    assert resolve("first_op", "auto", "cuda") == "triton"


def test_a_single_token_runs_the_recurrence_itself_where_there_are_no_kernels(chosen):
    def backend(tokens, asked="auto"):
        x = torch.zeros(1, tokens, 2, 4)
        problem = DeltaRecurrence(None).problem(DeltaInputs(x, x, x), Documents.whole(1, tokens), backend=asked)
        return problem.backend

    assert (backend(1), backend(2)) == ("reference", "chunked")
    assert backend(1, "chunked") == "chunked"
    chosen(delta_rule="chunked")
    assert backend(1) == "chunked"


def test_a_choice_that_cannot_run_is_refused_before_anything_runs(chosen, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"kernels.delta_rule must be one that runs on cpu; got 'triton'"):
        chosen(delta_rule="triton")
    chosen("cuda", delta_rule="triton")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"kernels.delta_rule must be one that is installed; .*pip install flash-lin"):
        chosen(delta_rule="library")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"kernels.rms_norm must be one that runs on cpu; got 'library'"):
        chosen(rms_norm="library")
    assert resolve("delta_rule", "auto", "cpu") == "chunked"


def test_what_runs_the_convolution_runs_the_shift(chosen, monkeypatch):
    x = torch.randn(1, 3, 2)
    monkeypatch.setattr(reference, "token_shift", lambda *_: "the reference's")
    assert isinstance(token_shift(x), torch.Tensor)
    chosen(short_conv="reference")
    assert token_shift(x) == "the reference's"
