"""netstat -sp ipsec|ah|esp|ipcomp: every drop is in one line, the words are netstat's."""

import pytest

from ipsecq.counters import COUNTERS_WORDS, Counter
from ipsecq.errors import IpsecqError
from ipsecq.metrics.netstat import SECTIONS, report


def counters(**values):
    words = [0] * COUNTERS_WORDS
    for name, value in values.items():
        words[Counter[name]] = value
    return words


def test_words_and_plurals():
    lines = report(counters(ESP_NOTDB=1, ESP_REPLAY=3, ESP_INPUT=2), "esp").splitlines()
    assert lines[0] == "esp:"
    assert "\t1 packet dropped; no TDB" in lines
    assert "\t3 possible replay packets detected" in lines
    assert "\t2 packets in" in lines
    assert "\t0 crypto processing failures" in lines


def test_all_protocols_are_in_the_whole_report():
    text = report(counters())
    assert [line for line in text.splitlines() if not line.startswith("\t")] == ["ipsec:", "ah:", "esp:", "ipcomp:"]


def test_no_counter_of_a_protocol_is_missing_or_shown_twice():
    shown = [counter for lines in SECTIONS.values() for _, summed in lines for counter in summed]
    assert len(shown) == len(set(shown))
    missing = {
        counter.name
        for counter in Counter
        if counter.name.split("_")[0] in ("ESP", "AH", "IPCOMP") and counter not in shown
    }
    assert missing == {"ESP_DUMMY", "ESP_TUNNEL", "AH_TUNNEL"}


def test_an_unknown_protocol_is_refused():
    with pytest.raises(IpsecqError, match="expected one of ipsec, ah, esp, ipcomp"):
        report(counters(), "tcp")
