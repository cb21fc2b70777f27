"""Dispatch: which implementation of an op runs, and why."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("longreach")

# What every op of this package has; `triton` joins op by op, as its kernels are written.
IMPLEMENTATIONS = ("chunked", "reference")

_logged: set[tuple[str, str, str]] = set()


def resolve(op: str, backend: str, tensor_device: torch.device | str) -> str:
    """The implementation of `op` that runs for tensors on `tensor_device`: "chunked" or "reference".

    "auto" is chunked torch on every device; "reference", the recurrence or the dense matrix as it is written, runs by
    request only. Nothing falls back in silence: a backend that is unknown or that cannot run raises ValueError. The
    choice is logged once for each op, backend and kind of device, to the logger "longreach".
    """
    device = torch.device(tensor_device).type
    if backend == "triton":
        raise ValueError(
            f"backend must be one that {op} has on {device}; got 'triton', for which {op} has no kernels. "
            f"Use 'auto' or one of {', '.join(IMPLEMENTATIONS)}"
        )
    if backend != "auto" and backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}; got {backend!r}. Choose one")
    chosen = "chunked" if backend == "auto" else backend
    if (op, chosen, device) not in _logged:
        _logged.add((op, chosen, device))
        why = "chosen for this device" if backend == "auto" else "by request"
        logger.info("%s on %s: %s, %s", op, device, chosen, why)
    return chosen
