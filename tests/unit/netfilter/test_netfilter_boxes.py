"""Selectors become prefix boxes that hold exactly the same packets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipsecq.netfilter.boxes import Box, boxes, pieces, prefix_length, prefixes
from ipsecq.policy.model import Selector

V4 = bytes([10, 0, 0, 0]), bytes([10, 0, 0, 255])


def ranges(bits: int) -> st.SearchStrategy[tuple[int, int]]:
    number = st.integers(0, (1 << bits) - 1)
    return st.tuples(number, number).map(lambda pair: (min(pair), max(pair)))


@given(ranges(12))
def test_prefixes_cover_a_range_exactly_once_and_are_aligned(pair: tuple[int, int]) -> None:
    found = prefixes(*pair, 12)
    assert [n for first, last in found for n in range(first, last + 1)] == list(range(pair[0], pair[1] + 1))
    assert len(found) <= 2 * 12 - 2 or pair == (0, 4095)
    for first, last in found:
        assert last - first + 1 == 1 << 12 - prefix_length(first, last, 12)


def test_a_port_selector_of_any_protocol_means_every_protocol_with_ports() -> None:
    found = boxes(Selector(*V4, *V4, dport_first=80, dport_last=80))
    assert {box.protocol for box in found} == {6, 17, 33, 132, 136}
    assert all(box.dport == (80, 80) for box in found)


def test_ports_of_a_protocol_without_ports_match_only_as_zero() -> None:
    assert boxes(Selector(*V4, *V4, protocol=47, dport_first=80, dport_last=80)) == []
    assert len(boxes(Selector(*V4, *V4, protocol=47, dport_first=0, dport_last=80))) == 1


def test_icmp_types_and_long_ranges_become_rules() -> None:
    icmp = boxes(Selector(*V4, *V4, protocol=1, sport_first=8, sport_last=8, dport_last=255))
    assert pieces(icmp[0], 32) is None
    assert icmp[0].match(4) == "ip saddr 10.0.0.0/24 ip daddr 10.0.0.0/24 meta l4proto 1 @th,0,8 8"
    assert pieces(Box((1, 0xFFFFFFFE), (1, 0xFFFFFFFE), -1, (0, 0xFFFF), (0, 0xFFFF)), 32) is None


def test_an_address_range_that_is_no_prefix_is_cut_into_map_entries() -> None:
    box = boxes(Selector(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 6]), *V4))[0]
    cut = pieces(box, 32)
    assert cut is not None
    assert sorted(piece.src[1] - piece.src[0] + 1 for piece in cut) == [1, 1, 2, 2]
