"""What a finished run shows."""

from longreach.trainer.baselines import Baselines
from longreach.trainer.report import comparison


def test_a_report_compares_with_counting_and_with_less_context() -> None:
    record = {
        "bits_per_byte": 1.5,
        "truncated_context": 16,
        "truncated_rows": 8,
        "truncated_bits_per_byte": 2.0,
        "untruncated_bits_per_byte": 1.6,
    }
    lines = comparison(record, Baselines(byte_unigram=4.5, token_unigram=3.0, token_bigram=2.0))
    assert [line.split()[-3] for line in lines if "needs" in line] == ["33.3%", "50.0%", "75.0%", "80.0%"]
    assert "8 held-out rows" in lines[5]
    assert comparison({"bits_per_byte": 1.5}, None) == []
