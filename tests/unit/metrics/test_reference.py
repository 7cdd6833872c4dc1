"""docs/metrics.md says what the collector says."""

from pathlib import Path

from ipsecq.metrics.reference import names, render


def test_the_reference_is_what_make_docs_would_write():
    assert (Path(__file__).parents[3] / "docs" / "metrics.md").read_text() == render(), "run: make docs"


def test_every_family_says_what_it_means_and_histograms_are_whole():
    assert not [line for line in render().splitlines() if line.startswith("| `ipsecq") and line.endswith("|  |")]
    assert {"ipsecq_packet_seconds_bucket", "ipsecq_packet_seconds_sum", "ipsecq_packet_seconds_count"} <= set(names())
