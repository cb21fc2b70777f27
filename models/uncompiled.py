"""Models run as they are: graphs of torch.compile are of the shapes of training, and see no cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock, _ending, _within = threading.Lock(), ExitStack(), 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, what torch.compile was asked for runs as it is written.

    Torch has one setting for all threads, and ranks may be threads: the first to come changes it, the last to leave
    puts it back.
    """
    global _within
    with _lock:
        if not _within:
            _ending.enter_context(torch.compiler.set_stance("force_eager"))
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                _ending.close()
