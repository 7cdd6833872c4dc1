"""docs/metrics.md says what the collector says."""

import re
from pathlib import Path

from ipsecq.metrics.reasons import REASONS
from ipsecq.metrics.reference import names, render

ROOT = Path(__file__).parents[3]


def test_the_reference_is_what_make_docs_would_write():
    assert (ROOT / "docs" / "metrics.md").read_text() == render(), "run: make docs"


def test_every_family_says_what_it_means_and_histograms_are_whole():
    assert not [line for line in render().splitlines() if line.startswith("| `ipsecq") and line.endswith("|  |")]
    assert {"ipsecq_packet_seconds_bucket", "ipsecq_packet_seconds_sum", "ipsecq_packet_seconds_count"} <= set(names())


def test_a_reason_is_counted_somewhere_unless_the_reference_says_that_it_never_is():
    counting = [path for path in (ROOT / "ipsecq").rglob("*.py") if path.parent.name not in {"metrics", "pcap"}]
    counted = set(re.findall(r"\bCounter\.(\w+)", "".join(path.read_text() for path in counting)))
    assert {each.name for each, text in REASONS.items() if "never counts" not in text} == counted & {
        each.name for each in REASONS
    }
