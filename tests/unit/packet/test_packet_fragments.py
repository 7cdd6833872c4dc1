"""Fragmentation and reassembly: round trips, scapy as the other end, and what must be refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_LSRR, IPOption_RR, defragment
from scapy.layers.inet import fragment as scapy_fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    defragment6,
    fragment6,
)
from scapy.packet import Raw

from ipsecq.packet import checksum
from ipsecq.packet.fragments import FRAGMENT_OVERHEAD, Reassembler, fragment
from ipsecq.packet.view import PacketView

V4 = {"src": "10.0.0.1", "dst": "10.0.0.2", "id": 7}
V6 = {"src": "2001:db8::1", "dst": "2001:db8::2"}


def reassembler(**limits) -> Reassembler:
    arguments = {"limit_bytes": 1 << 20, "limit_datagrams": 100, "timeout": 30.0} | limits
    return Reassembler(**arguments)


def join(pieces, machine=None) -> list[bytes]:
    machine = machine or reassembler()
    return [whole for piece in pieces if (whole := machine.add(piece, 1.0)) is not None]


def data(n: int) -> bytes:
    return random.Random(n).randbytes(n)


LAYERS = [
    IP(**V4) / UDP(),
    IP(**V4, options=[IPOption_RR(routers=["0.0.0.0"] * 3), IPOption_LSRR(routers=["10.0.0.3"])]) / UDP(),
    IPv6(**V6) / UDP(),
    IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(),
    IPv6(**V6) / IPv6ExtHdrRouting(type=2, addresses=["2001:db8::9"], segleft=1) / IPv6ExtHdrDestOpt() / UDP(),
]


@pytest.mark.parametrize("layers", LAYERS, ids=range(len(LAYERS)))
@given(size=st.integers(0, 5000), mtu=st.integers(180, 1600), again=st.integers(0, 60), rnd=st.randoms())
def test_fragments_in_any_order_and_cut_twice_make_the_datagram(layers, size, mtu, again, rnd):
    packet = bytes(layers / Raw(data(size)))
    pieces = fragment(packet + b"trailer", mtu, 7)
    assert all(len(piece) <= mtu for piece in pieces)
    assert (len(pieces) == 1) == (len(packet) <= mtu)
    other = 8 if len(pieces) > 1 else 7  # a fragment's own identification must win
    pieces = [part for piece in pieces for part in fragment(piece, mtu - again, other)]
    assert pieces
    rnd.shuffle(pieces)
    if len(pieces) > 1:
        assert join(pieces[1:]) == []
    assert join(pieces) == [packet]


def test_scapy_puts_our_ipv4_fragments_together():
    packet = IP(**V4, tos=3) / UDP() / Raw(data(4000))
    pieces = [IP(piece) for piece in fragment(bytes(packet), 576, 7)]
    assert [bytes(whole) for whole in defragment(pieces)] == [bytes(packet)]


def test_scapy_puts_our_ipv6_fragments_together():
    packet = IPv6(**V6) / UDP() / Raw(data(4000))
    pieces = [IPv6(piece) for piece in fragment(bytes(packet), 1280, 7)]
    assert {p[IPv6ExtHdrFragment].id for p in pieces} == {7}
    assert bytes(defragment6(pieces)) == bytes(packet)


def test_scapys_fragments_are_put_together():
    packet = IP(**V4) / UDP() / Raw(data(3000))
    assert join(bytes(p) for p in scapy_fragment(packet, 500)) == [bytes(packet)]
    packet = IPv6(**V6) / IPv6ExtHdrFragment(id=6) / UDP() / Raw(data(3000))
    assert join(bytes(p) for p in fragment6(packet, 1280)) == [bytes(IPv6(**V6) / UDP() / Raw(data(3000)))]


def test_options_go_into_later_fragments_by_their_copied_flag():
    first, *later = [IP(piece) for piece in fragment(bytes(LAYERS[1] / Raw(data(3000))), 1000, 7)]
    assert [o.option for o in first.options if o.option] == [7, 3]
    for piece in later:
        assert [o.option for o in piece.options if o.option] == [3]


def test_every_ipv4_fragment_has_a_right_header_checksum():
    for octets in fragment(bytes(LAYERS[1] / Raw(data(3000))), 1000, 7):
        assert checksum.ones_complement(octets[: (octets[0] & 15) * 4]) == 0xFFFF


def test_df_is_clear_in_fragments_and_kept_in_what_fits():
    packet = bytes(IP(**V4, flags="DF") / UDP() / Raw(data(1000)))
    assert fragment(packet, 2000, 9) == [packet]
    assert {str(IP(p).flags) for p in fragment(packet, 500, 9)} == {"MF", ""}
    assert {IP(p).id for p in fragment(packet, 500, 9)} == {9}


def test_no_room_for_eight_octets_gives_no_fragments():
    assert fragment(bytes(IP() / UDP() / Raw(data(100))), 27, 1) == []
    assert len(fragment(bytes(IP() / UDP() / Raw(data(100))), 28, 1)) == 14
    assert fragment(bytes(IPv6(**V6) / UDP() / Raw(data(100))), 55, 1) == []
    # the first fragment holds the header chain (RFC 7112)
    packet = bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP() / Raw(data(100)))
    assert fragment(packet, 63, 1) == []
    assert fragment(packet, 64, 1) != []


def test_an_atomic_fragment_is_whole_beside_fragments_of_its_identification():
    machine = reassembler()
    first, last = fragment(bytes(IPv6(**V6) / UDP() / Raw(data(1400))), 1280, 5)
    assert machine.add(first, 1) is None
    atomic = bytes(IPv6(**V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrFragment(id=5) / UDP(sport=1) / Raw(b"x"))
    assert machine.add(atomic, 1) == bytes(IPv6(**V6) / IPv6ExtHdrHopByHop() / UDP(sport=1) / Raw(b"x"))
    assert machine.add(last, 1) is not None
    assert machine.counts["atomic"] == 1


def test_what_is_whole_comes_back_at_once():
    packet = bytes(IP() / UDP() / Raw(b"x"))
    assert join([packet + b"trailer"]) == [packet]


def cut(offset: int, octets: bytes, more: bool, *, version: int = 6, **fields) -> bytes:
    if version == 4:
        fields = V4 | {"frag": offset // 8, "flags": "MF" if more else 0, "proto": 17} | fields
        return bytes(IP(**fields) / Raw(octets))
    return bytes(IPv6(**V6, **fields) / IPv6ExtHdrFragment(offset=offset // 8, m=more, id=7, nh=17) / Raw(octets))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "second", [(8, bytes(16), True), (8, b"\1" * 8, True), (8, bytes(8), False), (0, bytes(16), True)]
)
def test_an_overlap_drops_the_whole_datagram_and_its_later_fragments(version, second):
    machine = reassembler()
    pieces = [cut(0, bytes(8), True, version=version), cut(8, bytes(8), True, version=version),
              cut(second[0], second[1], second[2], version=version), cut(16, bytes(8), False, version=version),
              cut(0, bytes(8), True, version=version)]  # fmt: skip
    assert join(pieces, machine) == []
    assert machine.counts["overlap"] == 1
    assert machine.counts["dead"] == 2
    assert machine.octets == 0
    machine.expire(100)
    assert machine.datagrams == 0


def test_an_exact_duplicate_is_ignored():
    machine = reassembler()
    pieces = [cut(16, bytes(8), False), cut(0, bytes(8), True), cut(0, bytes(8), True), cut(16, bytes(8), False)]
    assert join(pieces, machine) == []
    assert machine.counts["duplicate"] == 2
    assert len(join([cut(8, bytes(8), True)], machine)) == 1


@pytest.mark.parametrize("pieces", [
    [cut(16, bytes(8), False), cut(24, bytes(8), False)],
    [cut(16, bytes(8), False), cut(24, bytes(8), True)],
    [cut(24, bytes(8), True), cut(8, bytes(8), False)],
])
def test_two_ends_drop_the_datagram(pieces):
    machine = reassembler()
    assert join([*pieces, cut(0, bytes(16), True)], machine) == []
    assert machine.counts["inconsistent"] == 1


def test_a_middle_fragment_of_odd_length_and_an_empty_one_are_malformed():
    machine = reassembler()
    assert join([cut(0, bytes(9), True), cut(8, b"", False), b"junk"], machine) == []
    assert machine.counts["malformed"] == 3
    assert machine.datagrams == 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_ping_of_death_is_refused(version):
    machine = reassembler()
    assert join([cut(0, bytes(8), True, version=version), cut(65528, bytes(8), False, version=version)], machine) == []
    assert machine.counts["too_long"] == 1
    assert machine.octets == 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_largest_datagram_is_put_together(version):
    space = 65515 if version == 4 else 65535
    packet = bytes((IP(**V4) if version == 4 else IPv6(**V6)) / UDP() / Raw(data(space - 8)))
    assert join(fragment(packet, 1500, 7)) == [packet]


@pytest.mark.parametrize(("marks", "result"), [([0, 0], 0), ([2, 3], 3), ([3, 1], 3), ([2, 1], 2), ([0, 3], None)])
@pytest.mark.parametrize("version", [4, 6])
def test_ecn_of_the_whole_is_that_of_rfc_3168(marks, result, version):
    field = "tos" if version == 4 else "tc"
    pieces = [cut(8 * i, bytes(8), i == 0, version=version, **{field: mark}) for i, mark in enumerate(marks)]
    whole = join(pieces)
    view = PacketView()
    assert [view.load(p) and view.tos for p in whole] == ([] if result is None else [result])
    if version == 4 and whole:
        assert checksum.ones_complement(whole[0][:20]) == 0xFFFF


def test_datagrams_are_told_apart_by_protocol_and_identification():
    machine = reassembler()
    pieces = [cut(0, bytes(8), True, version=4), cut(8, bytes(8), False, version=4, proto=6),
              cut(8, bytes(8), False, version=4, id=8), cut(8, bytes(8), False, version=4, src="10.0.0.7")]  # fmt: skip
    assert join(pieces, machine) == []
    assert machine.datagrams == 4


def test_a_datagram_waits_for_the_timeout_and_no_longer():
    first, last = cut(0, bytes(8), True), cut(8, bytes(8), False)
    machine = reassembler(timeout=30.0)
    assert machine.add(first, 100.0) is None
    assert machine.add(last, 129.9) is not None
    assert machine.add(first, 200.0) is None
    assert machine.add(last, 230.0) is None
    assert machine.counts["timeout"] == 1


def test_the_oldest_datagram_goes_when_there_are_too_many():
    machine = reassembler(limit_datagrams=3)
    for number in range(5):
        assert machine.add(cut(0, bytes(8), True, version=4, src=f"10.0.1.{number}"), float(number)) is None
    assert (machine.datagrams, machine.counts["limit_datagrams"]) == (3, 2)
    assert machine.add(cut(8, bytes(8), False, version=4, src="10.0.1.4"), 5) is not None
    assert machine.add(cut(8, bytes(8), False, version=4, src="10.0.1.0"), 5) is None


def test_octets_held_stay_below_the_limit():
    limit = 10 * (800 + FRAGMENT_OVERHEAD)
    machine = reassembler(limit_bytes=limit, limit_per_source=1000, limit_datagrams=1000)
    for number in range(50):
        machine.add(cut(0, bytes(800), True, version=4, id=number), 1)
        assert machine.octets <= limit
    assert (machine.datagrams, machine.counts["limit_bytes"]) == (10, 40)


def test_one_datagram_larger_than_the_limit_goes_itself():
    machine = reassembler(limit_bytes=1000)
    assert join([cut(0, bytes(800), True), cut(800, bytes(800), True)], machine) == []
    assert (machine.octets, machine.datagrams) == (0, 0)


def test_one_source_cannot_push_out_the_others():
    machine = reassembler(limit_datagrams=10, limit_per_source=4)
    assert machine.add(cut(0, bytes(8), True, version=4, src="10.0.9.9"), 1) is None
    for number in range(50):
        machine.add(cut(0, bytes(8), True, version=4, id=number), 1)
    assert machine.counts["limit_source"] == 46
    assert machine.add(cut(8, bytes(8), False, version=4, src="10.0.9.9"), 1) is not None


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3), st.booleans(), st.integers(0, 5)), max_size=30))
def test_any_fragments_keep_the_accounts_and_never_invent_octets(pieces):
    machine = reassembler(limit_bytes=2000, limit_datagrams=4, limit_per_source=3, timeout=10)
    for now, (offset, units, more, source) in enumerate(pieces):
        octets = bytes([source]) * (8 * units)
        whole = machine.add(cut(8 * offset, octets, more, version=4, src=f"10.0.0.{source}"), now)
        if whole is not None:
            assert set(whole[20:]) <= {source}
        held = list(machine._partials.values())
        assert machine.octets == sum(p.octets for p in held) <= 2000
        assert all(p.octets == sum(map(len, p.pieces.values())) + FRAGMENT_OVERHEAD * len(p.pieces) for p in held)
        assert sum(machine._sources.values()) == len(held) <= 4


@given(st.binary(max_size=150), st.integers(-5, 200))
def test_any_octets_are_cut_joined_or_dropped(octets, mtu):
    machine = reassembler()
    for first in (0x45, 0x60, 0x46):
        packet = bytearray(octets)
        if packet:
            packet[0] = first
        fragment(packet, mtu, 1)
        machine.add(packet, 0)


@pytest.mark.parametrize("version", [4, 6])
def test_a_fragment_that_reaches_beyond_65535_octets_is_not_cut_further(version):
    """Found by fuzzing: the pieces' offsets would not fit their field (the "ping of death")."""
    octets = bytes(1000)
    inside, beyond = (bytes(cut(offset, octets, True, version=version)) for offset in (64000, 65200))
    assert len(fragment(inside, 500, 1)) == 3
    assert fragment(beyond, 500, 1) == []
