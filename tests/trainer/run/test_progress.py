"""What the terminal shows: a bar where there is one, plain lines elsewhere, nothing on other ranks."""

import errno
import io
import os

import pytest
from rich.console import Console

from longreach.trainer.run.progress import RunProgress, count, duration


def run(*, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    progress = RunProgress(10, 2, 4, quiet=quiet, console=console)
    progress.start()
    progress.say("a message [with brackets], longer than the terminal is wide: " + "x" * 80)
    for step in range(3, 11):
        record = {"loss": 5.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 12345.0}
        progress.step(step, record, 2.0)
    progress.close()
    return out.getvalue()


def test_plain_lines_every_few_steps_and_at_both_ends() -> None:
    lines = run(terminal=False).splitlines()
    assert lines[0].startswith("a message [with brackets]")
    assert lines[0].endswith("x" * 80)
    assert [line.split()[1] for line in lines[1:]] == ["3/10", "4/10", "8/10", "10/10"]
    assert lines[3] == "step 8/10  loss 0.6250  grad_norm 1.000  learning_rate 1.00e-03  12.3k tokens/s  4 s left"


@pytest.mark.parametrize("terminal", [True, False])
def test_meters_are_shown_where_there_are_any(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, highlight=False, soft_wrap=True)
    progress = RunProgress(1, 0, 1, quiet=False, console=console)
    progress.start()
    record = {"loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 12345.0, "seconds": 2.0}
    meters = {"mfu": 0.412, "peak_memory_bytes": 3 << 29, "communication_seconds": 0.3, "padding": 0.07}
    progress.step(1, record | meters, 2.0)
    progress.close()
    assert "12.3k tokens/s  41.2% MFU  1.50 GiB  15% waiting  7% padding  0 s left" in out.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    shown = run(terminal=True)
    for part in ("10/10", "loss 0.5000", "12.3k tokens/s", "0 s left", "━"):
        assert part in shown


def test_output_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a full disk, where what is printed comes when there is room again, nor a reader that has gone."""

    class Full(io.StringIO):
        room = False

        def write(self, text: str) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    out = Full()
    monkeypatch.setattr("sys.stdout", out)
    progress = RunProgress(10, 0, 1, quiet=False)
    progress.say("lost")
    out.room = True
    progress.say("there")
    assert out.getvalue().endswith("there\n")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        progress.say("to nobody")
        progress.say("to nobody")


def test_other_ranks_are_silent() -> None:
    assert run(terminal=False, quiet=True) == ""
    assert run(terminal=True, quiet=True) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3:05 min"), (3599.6, "1:00 h"), (7801, "2:10 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(874, "874"), (1234, "1.23k"), (12345, "12.3k"), (2.86e6, "2.86M")])
def test_counts_are_short(number: float, text: str) -> None:
    assert count(number) == text
