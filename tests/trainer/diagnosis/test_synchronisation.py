"""What would make the host wait for a device is seen on tensors without data, in forward and in backward."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longreach.kernels.pointwise import rms_norm
from longreach.trainer.diagnosis.synchronisation import Synchronisations

HOST = torch.arange(4)


def found(function: Callable[[Tensor], object], x: Tensor | None = None) -> list[str]:
    """What is recorded; most of it then raises on `meta`."""
    with Synchronisations("meta") as recorded, contextlib.suppress(RuntimeError, TypeError):
        function(torch.ones(4, device="meta") if x is None else x)
    return [each.operation for each in recorded]


WAITS = {
    "item": (lambda x: x[0].item(), "_local_scalar_dense"),
    "float": (lambda x: float(x.sum()), "_local_scalar_dense"),
    "if": (lambda x: 1 if (x > 0).any() else 0, "_local_scalar_dense"),
    "cpu": (lambda x: x.cpu(), "a copy from meta to cpu"),
    "tolist": (lambda x: x.tolist(), "a copy from meta to cpu"),
    "copied back": (lambda x: torch.empty(4).copy_(x), "a copy from meta to cpu"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "bincount": (lambda x: x.long().bincount(), "bincount"),
    "repeated": (lambda x: x.repeat_interleave(x.long()), "repeat_interleave without output_size"),
    "by mask": (lambda x: x[x > 0], "index by a mask"),
    "put by mask": (lambda x: x.__setitem__(x > 0, torch.ones(4, device="meta")), "index_put_ by a mask"),
    "by list": (lambda x: x[[0, 2]], "indexing by a list"),
    "put by list": (lambda x: x.__setitem__(([0, 2],), 1.0), "indexing by a list"),
    "tensor": (lambda x: torch.tensor([1, 2], device=x.device), "tensor of values of the host"),
    "tensor of a number": (lambda x: torch.tensor(1.0, device=x.device), "tensor of values of the host"),
    "as_tensor": (lambda x: torch.as_tensor((1, 2), device=x.device), "as_tensor of values of the host"),
    "new_tensor": (lambda x: x.new_tensor([1, 2]), "new_tensor of values of the host"),
    "to": (lambda x: HOST.to(x.device), "a pageable copy to meta"),
    "to, not blocking": (lambda x: HOST.to(x.device, non_blocking=True), "a pageable copy to meta"),
    "copied": (lambda x: x.copy_(HOST), "a pageable copy to meta"),
    "by index of the host": (lambda x: x[HOST], "index of tensors on meta and on another device"),
    "added": (lambda x: x + HOST, "add of tensors on meta and on another device"),
}
GOES_ON = {
    "filled": lambda x: torch.full((3,), 2.0, device=x.device) + torch.arange(3, device=x.device),
    "scalars of the host": lambda x: x * 2.0 + HOST[0] + torch.tensor(3.0),
    "on the host": lambda x: (HOST[HOST > 1].tolist(), torch.tensor([1]).item(), HOST.nonzero()),
    "put at a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, float("-inf")),
    "by index": lambda x: (x[torch.zeros(2, dtype=torch.int64, device=x.device)], x[1:3], x[..., None], x[-1]),
    "repeated": lambda x: (x.repeat_interleave(2), x.repeat_interleave(x.long(), output_size=8)),
    "copied": lambda x: (x.clone(), x.to(torch.bfloat16), x.copy_(x)),
    "a tensor of it": lambda x: torch.as_tensor(x),
    "sorted": lambda x: (x.sort(), x.cumsum(0), x.argsort(stable=True), x.topk(2)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_recorded_once(name: str) -> None:
    function, operation = WAITS[name]
    assert found(function) == [operation]


@pytest.mark.parametrize("name", GOES_ON)
def test_what_goes_on_is_not_recorded(name: str) -> None:
    with Synchronisations("meta") as recorded:
        GOES_ON[name](torch.ones(4, device="meta"))
    assert not recorded.found


def test_backward_is_seen_too() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            torch.tensor([1.0], device=gradient.device)
            return gradient * gradient.sum().item()

    x = torch.ones(4, device="meta", requires_grad=True)
    assert found(lambda x: Reads.apply(x).sum().backward(), x) == [
        "tensor of values of the host",
        "_local_scalar_dense",
    ]


def test_recomputation_is_seen_too() -> None:
    def block(x: Tensor) -> Tensor:
        return x * torch.tensor([2.0], device=x.device)

    x = torch.ones(4, device="meta", requires_grad=True)
    twice = found(lambda x: checkpoint(block, x, use_reentrant=False).sum().backward(), x)
    assert twice == ["tensor of values of the host"] * 2


def test_the_line_of_the_package_is_told() -> None:
    weight = torch.ones(4)  # on the host
    with Synchronisations("meta") as recorded, contextlib.suppress(RuntimeError):
        rms_norm(torch.ones(2, 4, device="meta"), weight, 1e-6)
    assert str(recorded.found[0]).startswith("kernels/pointwise/rms_norm.py:")
    with Synchronisations("meta") as recorded:
        torch.tensor([1], device="meta")
    assert "test_synchronisation.py:" in str(recorded.found[0])
