"""Coalescing is the reverse of segmentation, and nothing is joined that it would not undo."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Raw

from ipsecq.packet import checksum
from ipsecq.packet.coalesce import coalesce
from ipsecq.packet.segments import split

OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (5, 6))]
HEADS = {
    "ipv4": lambda **k: IP(**({"src": "10.0.0.1", "dst": "10.0.1.2", "id": 65530} | k)),
    "ipv4 df": lambda **k: IP(**({"src": "10.0.0.1", "dst": "10.0.1.2", "flags": "DF"} | k)),
    "ipv6": lambda **k: IPv6(**({"src": "2001:db8::1", "dst": "2001:db8::2", "fl": 9} | k)),
}


def data(n: int) -> bytes:
    return random.Random(n).randbytes(n)


def segment(seq: int, n: int = 100, *, ip=None, version: str = "ipv4 df", **tcp) -> bytes:
    fields = {"sport": 1, "dport": 2, "seq": seq, "ack": 7, "flags": "A", "window": 500, "options": OPTIONS} | tcp
    return bytes(HEADS[version](**(ip or {})) / TCP(**fields) / Raw(data(n)))


def shapes(packets) -> list[int]:
    """How many packets each run holds."""
    return [len(run.parts) - 1 if run.size else 1 for run in coalesce(packets)]


def whole(run) -> bytes:
    return b"".join(run.parts)


@pytest.mark.parametrize("version", HEADS)
@given(size=st.integers(1, 30000), mss=st.integers(64, 1500), flags=st.sampled_from(["A", "PA", "EA"]),
       seq=st.integers(0, 2**32 - 1), options=st.sampled_from([[], OPTIONS]), trailer=st.sampled_from([b"", b"pad"]))
def test_a_split_packet_becomes_itself_again(version, size, mss, flags, seq, options, trailer):
    tcp = TCP(seq=seq, flags=flags, ack=7, window=9, options=options)
    packet = bytes(HEADS[version]() / tcp / Raw(data(size)))
    pieces = split(packet, mss)
    runs = coalesce([piece + trailer for piece in pieces])
    assert len(runs) == 1
    if len(pieces) == 1:
        assert runs[0].size == 0
        assert whole(runs[0]) == packet + trailer
    else:
        assert checksum.complete(whole(runs[0])) == packet
        assert (runs[0].size, runs[0].version) == (mss, int(version[3]))
        assert len(runs[0].parts[0]) == runs[0].header == runs[0].offset + 20 + (12 if options else 0)
        assert split(whole(runs[0]), mss) == pieces


@pytest.mark.parametrize("version", HEADS)
def test_the_checksum_field_holds_the_pseudo_headers_sum(version):
    run = coalesce(split(segment(1, 3000, version=version), 1000))[0]
    packet = whole(run)
    field = packet[run.offset + 16 : run.offset + 18]
    zeroed = packet[: run.offset + 16] + b"\0\0" + packet[run.offset + 18 :]
    # What the kernel or the device does: sum from csum_start on, with the field as it stands.
    filled = 0xFFFF - checksum.ones_complement(zeroed[run.offset :], int.from_bytes(field))
    right = zeroed[: run.offset + 16] + filled.to_bytes(2) + zeroed[run.offset + 18 :]
    assert checksum.verify_transport(right)
    assert right == segment(1, 3000, version=version)


DIFFERENT = {
    "a gap": segment(201),
    "a repetition": segment(1),
    "another ack": segment(101, ack=8),
    "another window": segment(101, window=501),
    "another time stamp": segment(101, options=[("NOP", None), ("NOP", None), ("Timestamp", (6, 6))]),
    "no options": segment(101, options=[]),
    "another port": segment(101, dport=3),
    "another address": segment(101, ip={"dst": "10.0.1.3"}),
    "CE": segment(101, ip={"tos": 3}),
    "another DSCP": segment(101, ip={"tos": 0x20}),
    "another TTL": segment(101, ip={"ttl": 63}),
    "DF clear": segment(101, ip={"flags": 0}),
    "a fragment": segment(101, ip={"flags": "MF"}),
    "IPv4 options": segment(101, ip={"options": [IPOption_Router_Alert()]}),
    "ECE": segment(101, flags="AE"),
    "CWR": segment(101, flags="AC"),
    "URG": segment(101, flags="AU"),
    "FIN": segment(101, flags="AF"),
    "RST": segment(101, flags="AR"),
    "SYN": segment(101, flags="AS"),
    "no ACK": segment(101, flags="P"),
    "no data": segment(101, 0),
    "more data": segment(101, 101),
    "a wrong IP checksum": segment(101, ip={"chksum": 1}),
    "a wrong TCP checksum": segment(101, chksum=1),
    "a TCP header too short": segment(101, dataofs=4),
    "a TCP header too long": segment(101, 8, dataofs=15),
    "UDP": bytes(HEADS["ipv4 df"]() / UDP(sport=1, dport=2) / Raw(data(100))),
    "IPv6": segment(101, version="ipv6"),
    "IPv6 extension headers": bytes(HEADS["ipv6"]() / IPv6ExtHdrDestOpt() / TCP() / Raw(data(100))),
    "a cut packet": segment(101)[:-1],
    "no packet": b"junk",
}


def test_the_segment_that_the_others_differ_from_is_joined():
    assert shapes([segment(1), segment(101)]) == [2]


@pytest.mark.parametrize("name", DIFFERENT)
def test_not_joined_to_a_segment_is_one_with(name):
    packets = [segment(1), DIFFERENT[name]]
    runs = coalesce(packets)
    assert [(run.size, whole(run)) for run in runs] == [(0, packets[0]), (0, packets[1])]


def test_flow_labels_and_traffic_classes_of_ipv6_are_told_apart():
    def pair(**ip):
        return [segment(1, version="ipv6"), segment(101, version="ipv6", ip=ip)]

    assert shapes(pair()) == [2]
    assert shapes(pair(fl=10)) == [1, 1]
    assert shapes(pair(tc=3)) == [1, 1]
    assert shapes(pair(hlim=9)) == [1, 1]


def test_without_df_identifications_must_count_up():
    def run(*identifications):
        return [segment(1 + 100 * n, version="ipv4", ip={"id": i}) for n, i in enumerate(identifications)]

    assert shapes(run(65535, 0, 1)) == [3]
    assert shapes(run(5, 5, 6)) == [1, 2]
    assert shapes(run(5, 7)) == [1, 1]


def test_push_and_a_short_segment_end_a_run():
    assert shapes([segment(1), segment(101, flags="PA"), segment(201), segment(301)]) == [2, 2]
    assert shapes([segment(1), segment(101, 64), segment(165), segment(265)]) == [2, 2]


def test_flows_that_take_turns_are_joined_each_in_its_order():
    mixed = [part for n in range(3) for part in (segment(1 + 100 * n), segment(1 + 100 * n, dport=9))]
    assert shapes(mixed) == [3, 3]


def test_what_lies_between_two_segments_of_a_flow_stays_between_them():
    packets = [segment(1), segment(101, 0), segment(101), segment(201)]
    assert shapes(packets) == [1, 1, 2]
    packets = [segment(1), segment(101, flags="FA"), segment(101)]
    assert shapes(packets) == [1, 1, 1]


def test_fragments_are_left_alone_even_beside_their_like():
    assert shapes([segment(1, ip={"flags": "MF"}), segment(101, ip={"flags": "MF"})]) == [1, 1]
    assert shapes([segment(1, ip={"frag": 5}), segment(101, ip={"frag": 5})]) == [1, 1]


def test_small_segments_are_left_alone():
    assert shapes([segment(1, 10), segment(11, 10)]) == [1, 1]


@pytest.mark.parametrize("version", HEADS)
@pytest.mark.parametrize("size", [1000, 1002, 1001])
@pytest.mark.parametrize("bad", [0, 1, 8, 11])
@pytest.mark.parametrize("total", [12, 3])
def test_one_damaged_segment_leaves_the_run_in_pieces(version, size, bad, total):
    bad %= total
    packets = split(segment(1, total * size, version=version), size)
    assert shapes(packets) == [total]
    packets[bad] = packets[bad][:-1] + bytes([packets[bad][-1] ^ 1])
    runs = coalesce(packets)
    assert [whole(run) for run in runs] == packets
    assert all(run.size == 0 for run in runs)


def test_errors_in_two_segments_do_not_make_up_for_each_other():
    packets = [bytearray(packet) for packet in split(segment(1, 12000), 1000)]
    word = len(packets[3]) - 2
    for index, change in ((3, 1), (4, -1)):
        value = int.from_bytes(packets[index][word:]) + change
        packets[index][word:] = (value & 0xFFFF).to_bytes(2)
    assert shapes(packets) == [1] * 12


def test_a_run_is_no_longer_than_a_packet_can_be():
    packets = [segment((1 + 1400 * n) % 2**32, 1400) for n in range(60)]
    assert shapes(packets) == [46, 14]
    assert all(len(whole(run)) <= 65535 for run in coalesce(packets))


STEP = st.tuples(
    st.integers(0, 8), st.sampled_from([64, 64, 64, 80, 0]), st.sampled_from(["A", "A", "PA", "FA"]), st.integers(1, 2)
)


@given(st.lists(STEP, max_size=12))
def test_every_flow_arrives_as_it_was_sent(steps):
    packets = [segment(64 * seq, size, flags=flags, dport=port) for seq, size, flags, port in steps]
    out = []
    for run in coalesce(packets):
        out.extend(split(whole(run), run.size) if run.size else [whole(run)])
    for port in (1, 2):
        # DF: identifications are free, and segmentation counts them up
        assert [strip(p) for p in out if p[23] == port] == [strip(p) for p in packets if p[23] == port]


def strip(packet: bytes) -> bytes:
    return packet[:4] + packet[6:10] + packet[12:]


@given(st.lists(st.tuples(st.sampled_from([0x45, 0x60, 0]), st.binary(max_size=120), st.booleans()), max_size=5))
def test_any_octets_come_back_as_they_were(packets):
    made = []
    for first, octets, fits in packets:
        packet = bytearray(bytes([first]) + octets)
        if fits and len(packet) >= 60:
            packet[6 if first == 0x60 else 9] = 6
            packet[4:6] = (len(packet) - 40).to_bytes(2)
            packet[2:4] = len(packet).to_bytes(2)
        made.append(bytes(packet))
    assert [whole(run) for run in coalesce(made)] == made
