"""Segment sizes learned from what the kernel cuts."""

from __future__ import annotations

import pytest

from ipsecq.datapath.gso import FRESH_SECONDS, SegmentSizes, flow_of
from ipsecq.packet import ipv4, ipv6

PSH, ACK = 0x08, 0x10


def tcp(data: int, *, sequence: int = 1000, flags: int = ACK, version: int = 4, port: int = 5001) -> bytes:
    segment = b"".join((
        (40000).to_bytes(2, "big"), port.to_bytes(2, "big"), sequence.to_bytes(4, "big"), bytes(4),
        bytes((0x50, flags)), bytes(6), bytes(data),
    ))  # fmt: skip
    if version == 4:
        return ipv4.header(b"\x0a\1\0\2", b"\x0a\2\0\2", 6, len(segment)) + segment
    return ipv6.header(bytes(15) + b"\2", bytes(15) + b"\3", 6, len(segment)) + segment


def learned(sizes: SegmentSizes, packet: bytes, size: int, now: float = 100.0) -> None:
    sizes.divert(packet, flow_of(packet), whole=True)
    version = 4 if packet[0] == 0x45 else 6
    sizes.learn(tcp(size, version=version), now)
    sizes.drained()


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_has_the_size_of_the_first_segment_that_the_kernel_cut(version: int) -> None:
    sizes = SegmentSizes()
    packet = tcp(5000, version=version)
    assert sizes.size_of(packet, flow_of(packet), 100.0) == 0
    learned(sizes, packet, 1000)
    assert sizes.size_of(packet, flow_of(packet), 100.5) == 1000
    other = tcp(5000, version=version, port=5002)
    assert sizes.size_of(other, flow_of(other), 100.5) == 0


def test_a_size_grows_old() -> None:
    sizes = SegmentSizes()
    packet = tcp(5000)
    learned(sizes, packet, 1000)
    assert sizes.size_of(packet, flow_of(packet), 100.0 + FRESH_SECONDS) == 0
    assert sizes.size_of(packet, flow_of(packet), 99.0) == 0  # the clock was set back


def test_data_that_are_no_multiple_ask_the_kernel_again_unless_the_sender_had_no_more() -> None:
    sizes = SegmentSizes()
    learned(sizes, tcp(5000), 1000)
    odd, last = tcp(4500), tcp(4500, flags=ACK | PSH)
    assert sizes.size_of(odd, flow_of(odd), 100.1) == 0
    assert sizes.size_of(last, flow_of(last), 100.1) == 1000


def test_only_the_first_segment_of_a_diverted_super_packet_teaches() -> None:
    sizes = SegmentSizes()
    packet = tcp(2500)
    sizes.divert(packet, flow_of(packet), whole=True)
    sizes.learn(tcp(500, sequence=3000), 100.0)  # its last one
    assert sizes.size_of(packet, flow_of(packet), 100.0) == 0
    sizes.learn(tcp(500, port=5002), 100.0)  # another flow, never diverted
    assert sizes.diverted == {flow_of(packet)}
    sizes.learn(tcp(1250), 100.0)
    assert sizes.size_of(packet, flow_of(packet), 100.0) == 1250


def test_all_that_is_not_plain_tcp_is_one_flow() -> None:
    assert flow_of(ipv4.header(b"\x0a\1\0\2", b"\x0a\2\0\2", 17, 40) + bytes(40)) is None
    assert flow_of(b"\x46" + bytes(60)) is None
    assert flow_of(b"") is None
