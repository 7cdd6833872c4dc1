"""Checksums against the plain word-by-word sum of RFC 1071 and against scapy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_SSRR
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.packet import Raw

from ipsecq.packet import checksum
from ipsecq.packet.view import PacketView

V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def rfc1071(octets: bytes) -> int:
    total = 0
    octets += b"\0" * (len(octets) & 1)
    for i in range(0, len(octets), 2):
        total += octets[i] << 8 | octets[i + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=70), st.integers(1, 40))
def test_the_sum_is_that_of_rfc_1071_whatever_the_length(octets, times):
    octets *= times
    assert checksum.ones_complement(octets) == rfc1071(octets)
    assert checksum.ones_complement(memoryview(bytearray(octets))) == rfc1071(octets)


@pytest.mark.parametrize("octets", [bytes(1500), b"\xff" * 1500, b"\xff\xff" + bytes(998), bytes(9), b"\xff" * 65535])
def test_the_two_zeros_are_told_apart(octets):
    assert checksum.ones_complement(octets) == rfc1071(octets)


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_a_sum_goes_on_from_a_part_of_even_length(first, second):
    first += bytes(len(first) & 1)
    assert checksum.ones_complement(second, checksum.ones_complement(first)) == rfc1071(first + second)


@given(st.binary(min_size=40, max_size=60), st.integers(0, 9), st.binary(min_size=4, max_size=4), st.booleans())
def test_an_update_agrees_with_a_new_sum(octets, word, after, as_int):
    octets = b"\x01" + octets[1:]
    before, rest = octets[2 * word + 2 : 2 * word + 6], octets[2 * word + 6 :]
    changed = octets[: 2 * word + 2] + after + rest
    old = 0xFFFF - rfc1071(octets)
    if as_int:
        assert checksum.update(old, int.from_bytes(before), int.from_bytes(after)) == 0xFFFF - rfc1071(changed)
    else:
        assert checksum.update(old, before, after) == 0xFFFF - rfc1071(changed)


PACKETS = [
    IP(src="10.0.0.1", dst="10.0.0.2") / TCP(dport=99) / Raw(b"odd"),
    IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=99) / Raw(b"e" * 1401),
    IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=99),
    IP(src="10.0.0.1", dst="10.0.0.9", options=[IPOption_SSRR(pointer=4, routers=["10.0.0.3", "10.0.0.2"])])
    / UDP()
    / Raw(b"x"),
    IPv6(**V6) / TCP() / Raw(bytes(1000)),
    IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP() / Raw(b"abc"),
    IPv6(**V6) / ICMPv6EchoRequest(data=b"ping"),
    IPv6(**V6) / IPv6ExtHdrFragment(id=5) / UDP() / Raw(b"atomic"),
    IPv6(**V6) / IPv6ExtHdrRouting(type=0, addresses=["2001:db8::3", "2001:db8::4"], segleft=2) / UDP() / Raw(b"r"),
    IPv6(**V6) / IPv6ExtHdrRouting(type=2, addresses=["2001:db8::3"], segleft=1) / TCP(),
]


@pytest.mark.parametrize("packet", PACKETS, ids=range(len(PACKETS)))
def test_complete_fills_what_scapy_computes(packet):
    right = bytes(packet)
    view = PacketView()
    assert view.load(right)
    field = view.offset + {6: 16, 17: 6, 58: 2}[view.protocol]
    offloaded = right[:field] + b"\x12\x34" + right[field + 2 :]
    assert checksum.verify_transport(right)
    assert not checksum.verify_transport(offloaded)
    assert checksum.complete(offloaded) == right
    assert checksum.complete(offloaded + b"trailer") == right


def test_a_source_route_is_summed_with_its_last_address():
    routed = checksum.complete(bytes(PACKETS[3]))
    direct = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / Raw(b"x"))
    assert routed[-3:] == direct[-3:]


def test_a_udp_sum_of_zero_is_sent_as_ones():
    packet = bytearray(bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / Raw(b"\0\0")))
    packet[28:30] = packet[26:28]  # data that make the sum come out as zero
    assert checksum.complete(packet)[26:28] == b"\xff\xff"
    assert checksum.verify_transport(checksum.complete(packet))


def test_udp_without_a_checksum_is_right_in_ipv4_only():
    assert checksum.verify_transport(bytes(IP() / UDP(chksum=0) / Raw(b"x")))
    assert not checksum.verify_transport(bytes(IPv6(**V6) / UDP(chksum=0) / Raw(b"x")))


def test_icmp_is_verified_without_a_pseudo_header():
    packet = bytes(IP() / ICMP() / Raw(b"data"))
    assert checksum.verify_transport(packet)
    assert not checksum.verify_transport(packet[:-1] + b"!")
    assert checksum.complete(packet) == packet


@pytest.mark.parametrize(
    "packet",
    [IP(flags="MF") / UDP(chksum=1) / Raw(bytes(8)), IP(proto=6) / Raw(bytes(19)), IP() / UDP(len=7, chksum=1),
     IP() / UDP(len=9, chksum=1), IP(proto=50) / Raw(bytes(40)), IPv6(nh=58, **V6) / Raw(bytes(3))],
)
def test_complete_leaves_what_has_no_checksum_of_its_own(packet):
    assert checksum.complete(bytes(packet)) == bytes(packet)


@given(st.binary(max_size=100), st.sampled_from([0x45, 0x46, 0x60, 0]), st.sampled_from([1, 6, 17, 58]))
def test_any_octets_are_completed_or_left(octets, first, protocol):
    packet = bytearray(octets)
    if len(packet) > 9:
        packet[0] = first
        packet[2:4] = len(packet).to_bytes(2)
        packet[4:6] = max(0, len(packet) - 40).to_bytes(2)
        packet[6 if first == 0x60 else 9] = protocol
    checksum.verify_transport(packet)
    assert len(checksum.complete(packet)) <= len(packet)
