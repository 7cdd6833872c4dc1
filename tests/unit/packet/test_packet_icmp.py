"""ICMP errors sent and received, with scapy as the other end."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP, ICMPerror, IPerror, UDPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.packet import Raw

from ipsecq.packet import checksum, icmp

V4 = {"src": "10.0.0.1", "dst": "10.0.1.2"}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}
GW4, GW6 = bytes([10, 0, 0, 254]), socket.inet_pton(socket.AF_INET6, "2001:db8::fe")


def test_icmp_too_big_is_what_scapy_reads_as_fragmentation_needed():
    packet = bytes(IP(**V4, flags="DF") / UDP(sport=5, dport=6) / Raw(bytes(1400)))
    octets = icmp.too_big(packet, 1350, GW4)
    error = IP(octets)
    assert len(octets) == error.len == 576
    assert (error.src, error.dst, error.tos) == ("10.0.0.254", "10.0.0.1", 0xC0)
    assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1350)
    assert (error[IPerror].dst, error[UDPerror].dport) == ("10.0.1.2", 6)
    assert octets[28:] == packet[:548]
    assert checksum.verify_transport(octets)
    assert checksum.ones_complement(octets[:20]) == 0xFFFF


def test_icmpv6_too_big_quotes_up_to_the_minimum_mtu():
    packet = bytes(IPv6(**V6) / UDP(sport=5, dport=6) / Raw(bytes(1400)))
    octets = icmp.too_big(packet, 1350, GW6)
    error = IPv6(octets)
    assert len(octets) == 1280
    assert (error.src, error.dst) == ("2001:db8::fe", "2001:db8::1")
    assert error[ICMPv6PacketTooBig].mtu == 1350
    assert octets[48:] == packet[:1232]
    assert checksum.verify_transport(octets)


def test_a_short_packet_is_quoted_whole_and_without_its_trailer():
    packet = bytes(IP(**V4) / UDP() / Raw(b"data"))
    assert icmp.too_big(packet + b"trailer", 1300, GW4)[28:] == packet
    packet = bytes(IPv6(**V6) / UDP() / Raw(b"data"))
    assert icmp.too_big(packet + b"trailer", 1300, GW6)[48:] == packet


FORBIDDEN = {
    "icmp error": IP(**V4) / ICMP(type=3, code=1) / Raw(bytes(28)),
    "redirect": IP(**V4) / ICMP(type=5) / Raw(bytes(28)),
    "cut icmp": IP(**V4, proto=1) / Raw(b"\x08"),
    "later fragment": IP(**V4, frag=1, proto=17) / Raw(bytes(28)),
    "from multicast": IP(src="224.0.0.1", dst="10.0.0.1") / UDP(),
    "from broadcast": IP(src="255.255.255.255", dst="10.0.0.1") / UDP(),
    "from nobody": IP(src="0.0.0.0", dst="10.0.0.1") / UDP(),
    "from loopback": IP(src="127.0.0.1", dst="10.0.0.1") / UDP(),
    "to multicast": IP(src="10.0.0.1", dst="224.0.0.1") / UDP(),
    "icmpv6 error": IPv6(**V6) / ICMPv6PacketTooBig() / Raw(bytes(48)),
    "redirect 6": IPv6(**V6) / ICMPv6ND_Redirect(),
    "error behind an extension": IPv6(**V6) / IPv6ExtHdrDestOpt() / ICMPv6DestUnreach(),
    "later fragment 6": IPv6(**V6) / IPv6ExtHdrFragment(offset=1, nh=17) / Raw(bytes(8)),
    "from multicast 6": IPv6(src="ff02::1", dst="2001:db8::1") / UDP(),
    "from nobody 6": IPv6(src="::", dst="2001:db8::1") / UDP(),
    "junk": Raw(b"junk"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_error_is_sent_about(name):
    octets = bytes(FORBIDDEN[name])
    source = GW6 if "6" in name or "extension" in name else GW4
    assert icmp.too_big(octets, 1300, source) == b""


def test_too_big_is_sent_about_ipv6_multicast():
    assert icmp.too_big(bytes(IPv6(src="2001:db8::1", dst="ff02::1") / UDP()), 1300, GW6) != b""


def test_questions_and_first_fragments_are_answered():
    assert icmp.too_big(bytes(IP(**V4) / ICMP()), 1300, GW4) != b""
    assert icmp.too_big(bytes(IP(**V4, flags="MF") / UDP() / Raw(bytes(8))), 1300, GW4) != b""
    assert icmp.too_big(bytes(IPv6(**V6) / ICMPv6EchoRequest()), 1300, GW6) != b""


def test_a_source_of_the_other_version_sends_nothing():
    assert icmp.too_big(bytes(IP(**V4) / UDP()), 1300, GW6) == b""


def test_scapys_error_about_esp_is_read():
    esp = IP(**V4, proto=50) / Raw(bytes.fromhex("00001234000000010000"))
    octets = bytes(IP(src="10.9.9.9", dst="10.0.0.1") / ICMP(type=3, code=4, nexthopmtu=1400) / esp)
    error = icmp.parse_error(octets)
    assert error is not None
    assert error.too_big
    assert (error.version, error.type, error.code, error.mtu, error.protocol, error.spi) == (4, 3, 4, 1400, 50, 0x1234)
    assert error.source == bytes([10, 9, 9, 9])
    assert (error.inner_src, error.inner_dst) == (bytes([10, 0, 0, 1]), bytes([10, 0, 1, 2]))
    assert octets[error.inner_offset :] == error.quoted == bytes(esp)


@pytest.mark.parametrize(
    ("protocol", "octets", "spi"),
    [(50, "0000123400000001", 0x1234), (51, "3204000000005678", 0x5678), (108, "06000abc", 0xABC), (51, "32040000", 0),
     (50, "000012", 0), (99, "0000123400000001", 0)],
)
def test_the_spi_is_read_where_the_quotation_reaches_it(protocol, octets, spi):
    six = IPv6(**V6) / IPv6ExtHdrHopByHop(nh=protocol) / Raw(bytes.fromhex(octets))
    error = icmp.parse_error(bytes(IPv6(**V6) / ICMPv6PacketTooBig(mtu=1300) / six))
    assert error is not None
    assert (error.mtu, error.protocol, error.spi, error.too_big) == (1300, protocol, spi, True)


def test_an_error_of_ours_is_read_back_with_its_ports():
    for packet, source in ((IP(**V4), GW4), (IPv6(**V6), GW6)):
        octets = bytes(packet / UDP(sport=500, dport=4500) / Raw(bytes(3000)))
        error = icmp.parse_error(icmp.too_big(octets, 1400, source))
        assert error is not None
        assert (error.mtu, error.sport, error.dport, error.protocol, error.spi) == (1400, 500, 4500, 17, 0)


def test_an_error_of_another_kind_tells_no_mtu():
    for outer, packet in ((IP(**V4) / ICMP(type=3, code=3), IP(**V4)), (IPv6(**V6) / ICMPv6DestUnreach(code=3), IPv6(**V6))):
        other = icmp.parse_error(bytes(outer / (packet / UDP(sport=500, dport=4500) / Raw(bytes(30)))))
        assert other is not None
        assert (other.code, other.mtu, other.too_big) == (3, 0, False)


@pytest.mark.parametrize("protocol", [4, 6])
def test_a_wrong_checksum_is_not_believed(protocol):
    packet, source = (IP(**V4), GW4) if protocol == 4 else (IPv6(**V6), GW6)
    octets = icmp.too_big(bytes(packet / UDP() / Raw(bytes(30))), 1400, source)
    assert icmp.parse_error(octets) is not None
    assert icmp.parse_error(octets[:-1] + b"\xff") is None


@pytest.mark.parametrize("packet", [
    IP(**V4) / ICMP(), IPv6(**V6) / ICMPv6EchoRequest(), IP(**V4) / UDP(), IP(**V4) / ICMP(type=3, code=4),
    IP(**V4) / ICMP(type=3, code=4) / Raw(b"\x45" + bytes(18)), IPv6(**V6) / ICMPv6PacketTooBig() / Raw(b"\x60" * 39),
    IP(**V4) / ICMP(type=3) / IPv6(**V6),
    IP(**V4, flags="MF") / ICMP(type=3) / IPerror(**V4) / ICMPerror() / Raw(bytes(4)),
], ids=range(8))
def test_what_is_no_whole_error_is_none(packet):
    assert icmp.parse_error(bytes(packet)) is None


@given(st.binary(max_size=120), st.sampled_from([0x45, 0x60]), st.integers(0, 13))
def test_any_quotation_is_read_or_refused(quoted, first, kind):
    inner = bytes([first]) + quoted
    outer = IP(**V4) / ICMP(type=kind, code=4) if first == 0x45 else IPv6(**V6) / ICMPv6PacketTooBig(type=kind)
    error = icmp.parse_error(bytes(outer / Raw(inner)))
    if error is not None:
        assert len(error.inner_src) in {4, 16}
        assert error.quoted == inner


@given(st.binary(max_size=120))
def test_any_octets_are_answered_or_not(octets):
    for first in (b"\x45", b"\x60"):
        icmp.parse_error(first + octets)
        icmp.too_big(first + octets, 1400, GW4 if first == b"\x45" else GW6)
