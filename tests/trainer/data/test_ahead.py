"""A loop whose items a thread makes ahead: in order, one ahead, with the thread's errors, and no thread left behind."""

import signal
import threading
import time

import pytest
import torch

from longreach.trainer.data.ahead import Ahead

CPU = torch.device("cpu")


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def eventually(holds) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


def test_items_come_in_order_and_each_is_made_while_the_one_before_it_is_used() -> None:
    made = []

    def items():
        for number in range(5):
            assert threading.current_thread() is not threading.main_thread()
            made.append(number)
            yield number

    with Ahead(items(), CPU) as ahead:
        assert eventually(lambda: made == [0])  # before anything is asked for
        for number in ahead:
            assert eventually(lambda n=number: made == list(range(min(n + 2, 5))))
            time.sleep(0.01)
            assert len(made) == min(number + 2, 5)  # one ahead, and no more
    assert number == 4
    assert not threads()


def test_an_error_is_raised_where_its_item_is_asked_for_and_ever_after() -> None:
    def items():
        yield 1
        raise OSError(5, "Input/output error", "tokens.arrow")

    with Ahead(items(), CPU) as ahead:
        assert next(ahead) == 1
        for _ in range(3):  # nobody waits for a thread that has ended
            with pytest.raises(OSError, match=r"Input/output error: 'tokens\.arrow'"):
                next(ahead)
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_a_loop_that_fails(error) -> None:
    def items():
        while True:
            yield 0

    def fails():
        with Ahead(items(), CPU) as ahead:
            next(ahead)
            raise error

    with pytest.raises(error):
        fails()
    assert not threads()


def test_a_signal_reaches_a_loop_that_waits_for_its_item() -> None:
    class Stopped(BaseException):
        pass

    def stop(number, frame):
        raise Stopped

    wait = threading.Event()

    def items():
        wait.wait(20)
        yield 0

    def waits():
        with Ahead(items(), CPU) as ahead:
            threading.Timer(0.05, lambda: (signal.raise_signal(signal.SIGUSR1), wait.set())).start()
            next(ahead)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stopped):
            waits()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not threads()
