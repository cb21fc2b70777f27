"""Which implementation runs: by device, by request, and never in silence."""

import logging

import pytest

from longreach.kernels import dispatch
from longreach.kernels.dispatch import resolve


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_auto_is_chunked_and_the_reference_runs_by_request_only(device):
    assert resolve("some_op", "auto", device) == "chunked"
    assert resolve("some_op", "chunked", device) == "chunked"
    assert resolve("some_op", "reference", device) == "reference"


def test_what_cannot_run_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="some_op has no kernels"):
        resolve("some_op", "triton", "cuda")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of chunked, reference; got 'flash'"):
        resolve("some_op", "flash", "cpu")


def test_the_choice_is_logged_once_an_op(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="longreach"):
        for _ in range(3):
            resolve("first_op", "auto", "cpu")
        resolve("second_op", "reference", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "first_op on cpu: chunked, chosen for this device",
        "second_op on cpu: reference, by request",
    ]
