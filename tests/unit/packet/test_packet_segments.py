"""Segmentation against scapy's own building of each segment."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrRouting
from scapy.packet import Raw

from ipsecq.packet import checksum
from ipsecq.packet.segments import split

V4 = {"src": "10.0.0.1", "dst": "10.0.1.2"}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (5, 6))]
HEADS = [
    lambda **_: IP(**V4, id=65530, flags="DF", tos=2),
    lambda **_: IP(**V4, id=3, options=[IPOption_Router_Alert()]),
    lambda **_: IPv6(**V6, fl=77, tc=2),
    lambda **_: IPv6(**V6) / IPv6ExtHdrRouting(type=2, addresses=["2001:db8::9"], segleft=1) / IPv6ExtHdrDestOpt(),
]


def data(n: int) -> bytes:
    return random.Random(n).randbytes(n)


@pytest.mark.parametrize("head", HEADS, ids=range(4))
@given(size=st.integers(1, 6000), mss=st.integers(1, 1500), flags=st.sampled_from(["A", "PA", "FPA", "CA", "FPCEA"]),
       start=st.integers(0, 2**32 - 1))  # fmt: skip
def test_tcp_segments_are_those_that_scapy_builds(head, size, mss, flags, start):
    mss = max(mss, size // 50 + 1)
    octets = data(size)
    fields = {"sport": 1, "dport": 2, "ack": 9, "window": 777, "options": OPTIONS}
    packet = bytes(head() / TCP(**fields, seq=start, flags=flags, chksum=0x1111) / Raw(octets))
    expected = []
    for index, at in enumerate(range(0, size, mss)):
        ip = head()
        if IP in ip:
            ip.id = (ip.id + index) & 0xFFFF
        keep = set(flags)
        if at:
            keep -= {"C"}
        if at + mss < size:
            keep -= {"F", "P"}
        tcp = TCP(**fields, seq=(start + at) % 2**32, flags="".join(keep))
        expected.append(bytes(ip / tcp / Raw(octets[at : at + mss])))
    assert split(packet + b"trailer", mss) == expected


@pytest.mark.parametrize("head", HEADS, ids=range(4))
@given(size=st.integers(1, 6000), mss=st.integers(1, 1500))
def test_udp_datagrams_are_those_that_scapy_builds(head, size, mss):
    mss = max(mss, size // 50 + 1)
    octets = data(size)
    packet = bytes(head() / UDP(sport=4, dport=5, chksum=0x1111) / Raw(octets))
    expected = []
    for index, at in enumerate(range(0, size, mss)):
        ip = head()
        if IP in ip:
            ip.id = (ip.id + index) & 0xFFFF
        expected.append(bytes(ip / UDP(sport=4, dport=5) / Raw(octets[at : at + mss])))
    assert split(packet, mss) == expected


def test_a_udp_sum_of_zero_is_sent_as_ones_in_every_segment():
    probe = IP(bytes(IP(**V4) / UDP() / Raw(b"\0\0")))
    block = probe[UDP].chksum.to_bytes(2)
    packet = bytes(IP(**V4) / UDP() / Raw(block * 3))
    assert [s[26:28] for s in split(packet, 2)] == [b"\xff\xff"] * 3
    assert all(checksum.verify_transport(s) for s in split(packet, 2))


def test_the_largest_packet_is_cut():
    packet = bytes(IP(**V4) / TCP(flags="PA") / Raw(data(65495)))
    segments = split(packet, 1448)
    assert b"".join(s[40:] for s in segments) == packet[40:]
    assert all(checksum.verify_transport(s) for s in segments)


@pytest.mark.parametrize("packet", [
    IP(**V4) / ICMP() / Raw(bytes(99)), IP(**V4, flags="MF") / UDP(chksum=1) / Raw(bytes(96)),
    IP(**V4) / TCP(flags="S", chksum=1) / Raw(bytes(99)), IP(**V4) / TCP(dataofs=4) / Raw(bytes(99)),
    IP(**V4, proto=6) / Raw(bytes(19)), IP(**V4) / UDP(chksum=1) / Raw(b"fits"),
], ids=range(6))
def test_what_cannot_be_cut_comes_back_alone(packet):
    assert split(bytes(packet), 10) == [checksum.complete(bytes(packet))]


def test_a_malformed_packet_gives_nothing():
    assert split(b"junk", 10) == []


@given(st.binary(max_size=120), st.sampled_from([0x45, 0x46, 0x60]), st.sampled_from([6, 17]), st.integers(-1, 60))
def test_any_octets_are_cut_or_come_back(octets, first, protocol, mss):
    packet = bytearray(octets)
    if len(packet) >= 40:
        packet[0] = first
        packet[6 if first == 0x60 else 9] = protocol
        if first == 0x60:
            packet[4:6] = (len(packet) - 40).to_bytes(2)
        else:
            packet[2:4], packet[6:8] = len(packet).to_bytes(2), b"\0\0"
    split(packet, mss)
