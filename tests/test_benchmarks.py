"""What benchmarks say of what they measured."""

import pytest

from longreach.benchmarks.steps import peers


@pytest.mark.parametrize(
    ("length", "seconds", "peaks", "end"),
    [
        (8192, (2.0, 5.0), (2**20, 2**21), "2.50 | 2.5 | met | 1 MiB | 2 MiB | 0.50 | 0.5 | met |"),
        (8192, (2.0, 4.9), (2**21, 2**21), "2.45 | 2.5 | NOT met | 2 MiB | 2 MiB | 1.00 | 0.5 | NOT met |"),
        (2048, (2.0, 3.6), (2**21, 2**21), "1.80 | 1.8 | met | 2 MiB | 2 MiB | 1.00 |  |  |"),
        (512, (2.0, 1.0), (2**21, 2**21), "0.50 |  |  | 2 MiB | 2 MiB | 1.00 |  |  |"),
    ],
)
def test_a_line_says_how_many_times_as_fast_and_which_goals_are_met(length, seconds, peaks, end):
    times, grown = ({"LongReach": ours, "transformers": theirs} for ours, theirs in (seconds, peaks))
    line = peers.line("mamba2", length, 3, times, grown, (3e-5, 4e-4))
    assert line == f"| mamba2 | {length:,} | 3 | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {end} 3e-05 | 4e-04 |"
    assert line.count("|") == peers.HEAD.splitlines()[0].count("|") == peers.HEAD.splitlines()[1].count("|")
