"""The capture reader says what scapy put into a pcap file."""

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.ipsec import ESP
from scapy.layers.l2 import ARP, Ether
from scapy.utils import wrpcap

from ipsecq.lab.capture import in_clear, other_than_esp, read, repeated_sequence_numbers


@pytest.fixture
def frames_of(tmp_path):
    def write_and_read(*packets, cut=0):
        path = tmp_path / "x.pcap"
        wrpcap(str(path), [Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02") / packet for packet in packets])
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        return list(read(path))

    return write_and_read


def esp4(spi, seq, data=b"x" * 24):
    return IP(src="192.0.2.1", dst="192.0.2.2") / ESP(spi=spi, seq=seq, data=data)


def test_esp_is_recognised_bare_in_udp_and_behind_extension_headers(frames_of):
    esp = ESP(spi=0x1234, seq=7, data=b"y" * 24)
    frames = frames_of(
        esp4(0x1234, 7),
        IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=4500, dport=4500) / esp,
        IPv6(src="2001:db8::1", dst="2001:db8::2") / IPv6ExtHdrDestOpt() / esp,
        IPv6(src="2001:db8::1", dst="2001:db8::2") / IPv6ExtHdrFragment(offset=0, m=1, nh=50) / esp,
    )
    assert [frame.esp for frame in frames] == [(0x1234, 7)] * 4
    assert other_than_esp(frames) == []


def test_a_later_fragment_of_esp_is_esp_without_numbers(frames_of):
    (frame,) = frames_of(IP(src="192.0.2.1", dst="192.0.2.2", proto=50, frag=10) / (b"z" * 40))
    assert frame.esp is None
    assert other_than_esp([frame]) == []
    assert frame.fragment_offset == 80


def test_ike_keepalives_and_clear_packets_are_other_than_esp(frames_of):
    frames = frames_of(
        IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=4500, dport=4500) / (bytes(4) + b"ike" * 9),
        IP(src="10.1.0.2", dst="10.2.0.2") / TCP(),
        IP(src="192.0.2.1", dst="192.0.2.2") / ICMP(),
    )
    assert len(other_than_esp(frames)) == 3


def test_address_resolution_is_left_alone(frames_of):
    frames = frames_of(ARP(), IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_NS(tgt="2001:db8::1"))
    assert other_than_esp(frames) == []


def test_an_inner_address_on_the_wire_is_in_clear(frames_of):
    frames = frames_of(
        IP(src="10.1.0.2", dst="203.0.113.1") / TCP(), IP(src="192.0.2.1", dst="10.2.0.9") / TCP(), esp4(1, 1)
    )
    assert in_clear(frames, "10.1.0.0/24", "10.2.0.0/24") == frames[:2]


def test_a_sequence_number_with_two_contents_is_found_and_a_mere_duplicate_is_not(frames_of):
    frames = frames_of(esp4(1, 1), esp4(1, 1), esp4(1, 2), esp4(2, 1, b"q" * 24))
    assert repeated_sequence_numbers(frames) == []
    frames = frames_of(esp4(1, 1), esp4(1, 1, b"w" * 24))
    assert repeated_sequence_numbers(frames) == [("192.0.2.2", 1, 1)]


def test_a_half_written_last_frame_is_left_out(frames_of):
    assert len(frames_of(esp4(1, 1), esp4(1, 2), cut=3)) == 1
