"""The judge of a capture finds what it is there for."""

import struct

import pytest

from ipsecq.lab.traffic import MARKER
from ipsecq.lab.wirecheck import WireCheck, keys_of
from ipsecq.packet import ipv4, ipv6

HERE, THERE = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
LINES = [
    "add 192.0.2.1 192.0.2.2 esp 0x100 -m tunnel -E aes-gcm-16 0x" + "11" * 20 + ";",
    "add 192.0.2.1 192.0.2.2 esp 0x101 -m tunnel -E aes-gcm-16 0x" + "11" * 20 + ";",
    "add 192.0.2.1 192.0.2.2 esp 0x200 -m tunnel -E aes-cbc 0x" + "22" * 16 + " -A hmac-sha2-256 0x" + "33" * 32 + ";",
    "add 2001:db8::1 2001:db8::2 esp 0x300 -E chacha20-poly1305 0x" + "44" * 36 + ";",
]


def esp(spi, sequence, iv, content=b"sealed" * 20, src=HERE, dst=THERE):
    payload = struct.pack("!II", spi, sequence) + iv + content
    if len(src) == 4:
        return b"\0" * 12 + b"\x08\0" + ipv4.header(src, dst, 50, len(payload)) + payload
    return b"\0" * 12 + b"\x86\xdd" + ipv6.header(src, dst, 50, len(payload)) + payload


def udp(src, dst, data):
    payload = struct.pack("!HHHH", 1, 2, 8 + len(data), 0) + data
    return b"\0" * 12 + b"\x08\0" + ipv4.header(src, dst, 17, len(payload)) + payload


@pytest.fixture
def judge(tmp_path):
    check = WireCheck(keys_of(LINES), ["10.1.0.0/24", "fd00:1::/64"])

    def findings(*frames):
        path = tmp_path / "wire.pcap"
        header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
        path.write_bytes(header + b"".join(struct.pack("<IIII", 1, 0, len(f), len(f)) + f for f in frames))
        check.read(path)
        return check.result()

    return findings


def test_clean_traffic_is_clean(judge):
    six = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "02")
    found = judge(
        *(esp(0x100, n, n.to_bytes(8, "big")) for n in range(1, 50)),
        esp(0x200, 1, bytes(16)),
        esp(0x300, 1, (1).to_bytes(8, "big"), src=six[0], dst=six[1]),
        udp(HERE, THERE, b"an operator's own"),
    )
    assert (found.packets, found.esp, found.pairs) == (52, 51, 51)
    assert (found.reused, found.clear, found.unknown, found.notes) == (0, 0, 0, [])


def test_an_iv_of_a_counter_mode_twice_is_found(judge):
    found = judge(esp(0x100, 1, bytes(7) + b"\1"), esp(0x100, 1, bytes(7) + b"\1", b"other " * 20))
    assert found.reused == 1
    assert "SPI 0x00000100" in found.notes[0]


def test_one_key_in_two_sas_is_one_key(judge):
    assert judge(esp(0x100, 1, bytes(7) + b"\1"), esp(0x101, 1, bytes(7) + b"\1", b"other " * 20)).reused == 1


def test_a_random_iv_twice_is_found_whatever_the_sequence_number(judge):
    assert judge(esp(0x200, 1, b"i" * 16), esp(0x200, 2, b"i" * 16)).reused == 1


def test_the_same_packet_twice_is_a_replay_and_no_reuse(judge):
    found = judge(esp(0x100, 1, bytes(8)), esp(0x100, 1, bytes(8)))
    assert (found.reused, found.pairs) == (0, 1)


def test_pairs_are_compared_over_captures(judge):
    assert judge(esp(0x100, 9, bytes(8))).reused == 0
    assert judge(esp(0x100, 9, bytes(8), b"later!" * 20)).reused == 1


@pytest.mark.parametrize(
    "frame",
    [udp(bytes([10, 1, 0, 7]), THERE, b"x"), udp(HERE, bytes([10, 1, 0, 7]), b"x"), udp(HERE, THERE, b"." + MARKER)],
    ids=["source", "destination", "content"],
)
def test_a_protected_address_or_the_labs_own_payload_in_clear_is_found(judge, frame):
    assert judge(frame).clear == 1


def test_esp_that_nobody_configured_is_found(judge):
    assert judge(esp(0x999, 1, bytes(8))).unknown == 1
