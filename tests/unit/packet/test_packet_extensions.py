"""Extension headers and options one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_NOP, IPOption_RR, IPOption_Security
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    Pad1,
    PadN,
    RouterAlert,
)
from scapy.packet import Raw

from ipsecq.packet.extensions import final_destination, iter_ipv4_options, iter_ipv6_headers, iter_ipv6_options
from ipsecq.packet.view import PacketView

V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def test_ipv6_headers_come_in_their_order():
    packet = (
        IPv6(**V6) / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / IPv6ExtHdrRouting(type=2, addresses=["::5"])
        / IPv6ExtHdrFragment() / IPv6ExtHdrDestOpt() / UDP()
    )  # fmt: skip
    assert iter_ipv6_headers(bytes(packet)) == [(0, 40, 8), (43, 48, 24), (44, 72, 8), (60, 80, 8)]


def test_a_later_fragment_and_ah_end_the_list():
    packet = IPv6(**V6) / IPv6ExtHdrFragment(offset=1, nh=60) / Raw(b"\xff" * 16)
    assert iter_ipv6_headers(bytes(packet)) == [(44, 40, 8)]
    packet = IPv6(**V6) / IPv6ExtHdrDestOpt(nh=51) / Raw(bytes(24))
    assert iter_ipv6_headers(bytes(packet)) == [(60, 40, 8)]


def test_headers_alone_are_read_without_what_followed_them():
    packet = bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP() / Raw(bytes(99)))
    assert iter_ipv6_headers(packet[:48]) == [(60, 40, 8)]
    assert iter_ipv6_headers(packet[:47]) is None


def test_ipv6_options_are_listed_with_their_padding():
    options = [RouterAlert(), Pad1(), HBHOptUnknown(otype=0x3E, optlen=3, optdata=b"abc"), PadN(optdata=b"\0\0")]
    packet = bytes(IPv6(**V6) / IPv6ExtHdrHopByHop(options=options, autopad=0) / UDP())
    headers = iter_ipv6_headers(packet)
    assert headers == [(0, 40, 16)]
    assert iter_ipv6_options(packet, headers[0]) == [(5, 42, 4), (0, 46, 1), (0x3E, 47, 5), (1, 52, 4)]


def test_an_ipv6_option_that_passes_its_header_is_malformed():
    packet = bytearray(bytes(IPv6(**V6) / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))]) / UDP()))
    header = iter_ipv6_headers(packet)[0]
    packet[43] = 5
    assert iter_ipv6_options(packet, header) is None


def test_ipv4_options_are_listed_up_to_the_end_of_the_list():
    options = [IPOption_NOP(), IPOption_RR(routers=["0.0.0.0"]), IPOption_Security()]
    packet = bytes(IP(options=options) / UDP())
    assert iter_ipv4_options(packet) == [(1, 20, 1), (7, 21, 7), (130, 28, 11), (0, 39, 1)]
    assert iter_ipv4_options(bytes(IP() / UDP())) == []


@pytest.mark.parametrize("octets", [b"\x07\x01\0\0", b"\x07\x05\0\0", b"\x01\x01\x01\x07", b"\x07\0\0\0"])
def test_an_ipv4_option_that_lies_about_its_length_is_malformed(octets):
    header = bytearray(bytes(IP(ihl=6)) + octets)
    assert iter_ipv4_options(header) is None


ROUTES = {
    "type 0": (IPv6ExtHdrRouting(type=0, addresses=["2001:db8::8", "2001:db8::9"], segleft=1), 9),
    "type 2": (IPv6ExtHdrRouting(type=2, addresses=["2001:db8::9"], segleft=1), 9),
    "segments": (IPv6ExtHdrSegmentRouting(addresses=["2001:db8::9", "2001:db8::2"], segleft=1, lastentry=1), 9),
    "finished": (IPv6ExtHdrRouting(type=0, addresses=["2001:db8::8"], segleft=0), 2),
    "unknown": (IPv6ExtHdrRouting(type=99, addresses=["2001:db8::9"], segleft=1), 2),
}


@pytest.mark.parametrize("name", ROUTES)
def test_the_final_destination_is_the_routing_headers_last_address(name):
    route, last = ROUTES[name]
    packet = bytes(IPv6(**V6) / route / UDP())
    view = PacketView()
    assert view.load(packet)
    assert final_destination(packet, view) == bytes.fromhex("20010db8") + bytes(11) + bytes([last])


@given(st.binary(min_size=40, max_size=140), st.sampled_from([0, 43, 44, 60]))
def test_any_ipv6_chain_is_listed_or_malformed(octets, first):
    packet = bytearray(octets)
    packet[0], packet[6] = 0x60, first
    for header in iter_ipv6_headers(packet) or ():
        assert 40 <= header.offset <= header.offset + header.length <= len(packet)
        for option in iter_ipv6_options(packet, header) or ():
            assert header.offset < option.offset <= option.offset + option.length <= header.offset + header.length


@given(st.binary(max_size=80), st.integers(0, 15))
def test_any_ipv4_options_are_listed_or_malformed(octets, words):
    packet = bytes([0x40 | words]) + octets
    for option in iter_ipv4_options(packet) or ():
        assert 20 <= option.offset < option.offset + option.length <= 4 * words <= len(packet)
