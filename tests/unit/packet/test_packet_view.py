"""PacketView against scapy, and against any octets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    RouterAlert,
)
from scapy.packet import Raw

from ipsecq.packet.view import MAX_EXTENSION_HEADERS, PacketView

V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def load(packet) -> PacketView:
    view = PacketView()
    assert view.load(bytes(packet))
    return view


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("options", [[], [IPOption_Router_Alert()]])
def test_ipv4_fields_are_those_that_scapy_wrote(protocol, options):
    packet = IP(src="10.1.2.3", dst="10.9.8.7", tos=0xB9, ttl=17, id=777, flags="DF", options=options) / protocol(
        sport=4321, dport=80
    )
    view = load(packet / Raw(b"data"))
    assert view.flow() == (bytes([10, 1, 2, 3]), bytes([10, 9, 8, 7]), 6 if protocol is TCP else 17, 4321, 80)
    assert (view.version, view.tos, view.ttl, view.identification) == (4, 0xB9, 17, 777)
    assert view.dont_fragment
    assert not view.more_fragments
    assert not view.is_fragment
    assert view.header_length == view.offset == 20 + 4 * len(options)
    assert view.nexthdr_offset == 9
    assert view.length == view.offset + (24 if protocol is TCP else 12)


def test_trailing_octets_are_no_part_of_the_datagram():
    packet = bytes(IP() / UDP() / Raw(b"x"))
    assert load(packet + bytes(17)).length == len(packet)
    packet = bytes(IPv6(**V6) / UDP() / Raw(b"x"))
    assert load(packet + bytes(17)).length == len(packet)


@pytest.mark.parametrize("packet", [IP() / TCP(), IP(options=[IPOption_Router_Alert()]) / UDP(), IPv6(**V6) / UDP(),
                                    IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP()])
def test_a_truncated_datagram_is_malformed_at_every_length(packet):
    octets = bytes(packet)
    view = PacketView()
    assert [n for n in range(len(octets) + 1) if view.load(octets[:n])] == [len(octets)]


def test_a_header_length_that_passes_the_total_length_is_malformed():
    octets = bytearray(bytes(IP() / UDP() / Raw(bytes(60))))
    octets[0] = 0x4F
    octets[2:4] = (40).to_bytes(2, "big")
    assert not PacketView().load(octets)
    octets[0] = 0x44
    assert not PacketView().load(octets)


@pytest.mark.parametrize("length", [0, 19])
def test_an_ipv4_total_length_below_the_header_is_malformed(length):
    octets = bytearray(bytes(IP() / UDP()))
    octets[2:4] = length.to_bytes(2, "big")
    assert not PacketView().load(octets)


@pytest.mark.parametrize("version", [0, 5, 7, 15])
def test_other_versions_are_refused(version):
    octets = bytearray(bytes(IPv6(**V6) / UDP()))
    octets[0] = version << 4 | 5
    assert not PacketView().load(octets)


def test_ports_are_zero_in_later_fragments_and_behind_the_end():
    view = load(IP(frag=3, flags="MF", proto=6) / Raw(bytes(range(40))))
    assert (view.sport, view.dport, view.fragment_offset) == (0, 0, 24)
    assert view.more_fragments
    assert view.is_fragment
    view = load(bytes(IP(proto=6) / Raw(b"\x01\x02\x03")) + b"\x04")
    assert (view.sport, view.dport) == (0, 0)
    view = load(bytes(IPv6(nh=17, **V6) / Raw(b"\x01\x02\x03")) + b"\x04")
    assert (view.sport, view.dport) == (0, 0)


def test_the_first_fragment_has_ports():
    view = load(IP(flags="MF") / UDP(sport=5, dport=6) / Raw(bytes(8)))
    assert (view.sport, view.dport, view.is_fragment, view.fragment_offset) == (5, 6, True, 0)


def test_icmp_type_and_code_stand_for_the_ports():
    assert load(IP() / ICMP(type=3, code=4)).flow()[2:] == (1, 3, 4)
    assert load(IPv6(**V6) / ICMPv6EchoRequest()).flow()[2:] == (58, 128, 0)
    assert load(IPv6(nh=135, **V6) / Raw(bytes([59, 0, 5, 0, 0, 0, 0, 0]))).flow()[2:] == (135, 5, 0)


def test_per_hop_headers_end_behind_the_routing_header():
    packet = (
        IPv6(tc=0x2E, fl=0x12345, hlim=9, **V6)
        / IPv6ExtHdrHopByHop(options=[RouterAlert()])
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrRouting(type=2, addresses=["2001:db8::9"], segleft=1)
        / IPv6ExtHdrFragment(id=99)
        / IPv6ExtHdrDestOpt()
        / UDP(sport=7, dport=8)
    )
    view = load(packet)
    assert (view.tos, view.flow_label, view.ttl, view.identification) == (0x2E, 0x12345, 9, 99)
    assert view.header_length == 40 + 8 + 8 + 24
    assert (view.header_nexthdr, bytes(packet)[view.header_nexthdr]) == (56, 44)
    assert (view.fragment_header, view.is_fragment) == (80, False)
    assert (view.nexthdr_offset, view.offset) == (88, 96)
    assert view.flow()[2:] == (17, 7, 8)


def test_destination_options_without_a_routing_header_are_fragmentable():
    view = load(IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP())
    assert (view.header_length, view.header_nexthdr, view.nexthdr_offset, view.offset) == (48, 40, 48, 56)
    view = load(IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP())
    assert (view.header_length, view.header_nexthdr, view.nexthdr_offset, view.offset) == (40, 6, 40, 48)


def test_a_later_ipv6_fragment_ends_the_chain():
    packet = IPv6(**V6) / IPv6ExtHdrFragment(offset=5, m=1, nh=60, id=7) / Raw(b"\xff" * 24)
    view = load(packet)
    assert (view.protocol, view.offset, view.fragment_offset, view.more_fragments) == (60, 48, 40, True)
    assert view.nexthdr_offset == view.fragment_header == 40
    assert view.flow()[3:] == (0, 0)


@pytest.mark.parametrize("protocol", [50, 51, 59, 108])
def test_the_chain_stops_at_esp_ah_and_no_next_header(protocol):
    view = load(IPv6(**V6) / IPv6ExtHdrHopByHop(nh=protocol) / Raw(bytes(32)))
    assert (view.protocol, view.offset, view.nexthdr_offset) == (protocol, 48, 40)


def test_jumbograms_are_refused():
    assert not PacketView().load(bytes(IPv6(plen=0, **V6) / IPv6ExtHdrHopByHop() / Raw(bytes(70000))))


def test_hop_by_hop_options_anywhere_but_first_are_malformed():
    assert not PacketView().load(bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP()))


def test_a_second_fragment_header_is_malformed():
    assert not PacketView().load(bytes(IPv6(**V6) / IPv6ExtHdrFragment() / IPv6ExtHdrFragment() / UDP()))


def test_a_chain_is_followed_to_its_bound_and_no_further():
    def chain(n: int) -> bytes:
        octets = b"".join(bytes([17 if i == n - 1 else 60, 0, 1, 4, 0, 0, 0, 0]) for i in range(n))
        return bytes(IPv6(nh=60, **V6) / Raw(octets + bytes(UDP(sport=1, dport=2))))

    assert load(chain(MAX_EXTENSION_HEADERS)).flow()[2:] == (17, 1, 2)
    assert not PacketView().load(chain(MAX_EXTENSION_HEADERS + 1))


def test_nothing_of_the_packet_before_is_left():
    view = PacketView()
    assert view.load(bytes(IPv6(**V6) / IPv6ExtHdrFragment(offset=1, id=5) / Raw(bytes(8))))
    assert view.load(bytes(IP(src="1.1.1.1", dst="2.2.2.2") / ICMP()))
    other = load(IP(src="1.1.1.1", dst="2.2.2.2") / ICMP())
    assert [getattr(view, name) for name in PacketView.__slots__] == [
        getattr(other, name) for name in PacketView.__slots__
    ]


@given(st.binary(max_size=200), st.sampled_from([None, 0x45, 0x46, 0x4F, 0x60]), st.booleans())
def test_any_octets_load_or_are_refused(octets, first, whole):
    packet = bytearray(octets)
    if first is not None and packet:
        packet[0] = first
    if whole and len(packet) >= 40:
        if packet[0] >> 4 == 4:
            packet[2:4] = len(packet).to_bytes(2, "big")
        else:
            packet[4:6] = (len(packet) - 40).to_bytes(2, "big")
    check_bounds(packet)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 43, 44, 60, 6, 50, 51]), st.integers(0, 3), st.binary(min_size=6, max_size=6))
    ),
    st.sampled_from([0, 43, 44, 60]),
    st.binary(max_size=40),
)
def test_any_chain_of_extension_headers_loads_or_is_refused(headers, first, tail):
    chain = b"".join(bytes([kind, units]) + body + bytes(8 * units) for kind, units, body in headers)
    check_bounds(bytes(IPv6(nh=first, **V6) / Raw(chain + tail)))


def check_bounds(packet) -> None:
    for buffer in (bytes(packet), bytearray(packet), memoryview(packet)):
        view = PacketView()
        if view.load(buffer):
            assert view.header_length <= view.offset <= view.length <= len(packet)
            assert view.nexthdr_offset < view.offset
            assert view.header_nexthdr < view.header_length
            assert packet[view.nexthdr_offset] == view.protocol
            assert len(view.src) == len(view.dst) == (4 if view.version == 4 else 16)
            assert 0 <= view.sport <= 65535 >= view.dport >= 0
