"""The views of enc(4): what a watcher of the engine is shown, and that it costs others nothing."""

from __future__ import annotations

import struct

import pytest
from engine_peers import make_peer, policy, udp

from ipsecq.counters import Fate
from ipsecq.engine.tap import AFTER, AUTHENTIC, BEFORE, CONFIDENTIAL, OUT, Tap
from ipsecq.packet import checksum
from ipsecq.packet.view import PacketView
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

GCM = "add 192.0.2.1 192.0.2.2 esp 0x1001 -m tunnel -r 4 -E aes-gcm-16 0x" + "11" * 20 + ";"
GCM6 = (
    "add 2001:db8::1 2001:db8::2 esp 0x1002 -m tunnel -E aes-cbc 0x" + "22" * 16
    + " -A hmac-sha2-256 0x" + "33" * 32 + ";"
)
AH = "add 10.1.0.7 10.2.0.7 ah 0x2001 -m transport -A hmac-sha2-256 0x" + "44" * 32 + ";"
TRANSPORT = "add 10.1.0.7 10.2.0.7 esp 0x2002 -m transport -E null -A hmac-sha2-256 0x" + "44" * 32 + ";"
TUNNEL = "ipsec esp/tunnel/192.0.2.1-192.0.2.2/require"
INNER = udp("10.1.0.7", "10.2.0.7", b"inner" * 20, tos=0x28)


class Watcher:
    """Keeps all it is shown."""

    def __init__(self, ways=(BEFORE | AFTER, BEFORE | AFTER), spis=()):
        self.ways, self.spis = ways, frozenset(spis)
        self.seen: list[tuple[int, tuple[int, int, int], bytes]] = []
        self.room = 1000

    def take(self) -> bool:
        self.room -= 1
        return self.room >= 0

    def drop(self, count: int) -> None:
        self.room -= count

    def record(self, kind, enc, front, body):
        family, flags = struct.unpack("=I4xI", enc)
        self.seen.append((kind, (family, int.from_bytes(enc[4:8], "big"), flags), front + bytes(body)))


def sas_of(*texts):
    return apply(parse("\n".join(texts)), Sad(), Spd(), now=1000.0).sad.dump()


def watched(sas, out, inbound, watcher, knobs=None):
    """Both ends of an SA, each watched by ``watcher``."""
    near, far = make_peer(sas, [out], knobs), make_peer(sas, [inbound], knobs)
    near.outbound.watch(Tap([watcher], near.tables.sysctl))
    far.inbound.watch(Tap([watcher], far.tables.sysctl))
    return near, far


BOTH = {"net.enc.in.ipsec_bpf_mask": 3}


def cross(near, far, packet):
    fate, wire = near.send(packet)
    assert fate == Fate.DONE
    fate, inner = far.receive(wire[0])
    assert (fate, inner) == (Fate.DONE, [packet])
    return wire[0]


def test_a_tunnel_shows_all_four_views():
    watcher = Watcher()
    near, far = watched(
        sas_of(GCM), policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL), watcher, BOTH,
    )  # fmt: skip
    wire = cross(near, far, INNER)
    kinds = [kind for kind, _, _ in watcher.seen]
    assert kinds == [OUT | BEFORE, OUT | AFTER, BEFORE, AFTER]
    assert {enc for _, enc, _ in watcher.seen} == {(2, 0x1001, CONFIDENTIAL | AUTHENTIC)}
    assert watcher.seen[0][2] == watcher.seen[3][2] == INNER
    for _, _, packet in watcher.seen[1:3]:
        assert packet[20:] == INNER
        assert packet[9] == 4
        assert int.from_bytes(packet[2:4], "big") == len(packet)
        assert checksum.ones_complement(packet[:20]) == 0xFFFF
        # The rest of the outer header is the one that is on the wire.
        assert (packet[1], packet[4:9], packet[12:20]) == (wire[1], wire[4:9], wire[12:20])


def test_ipv6_around_ipv4_names_the_family_of_what_is_shown():
    watcher = Watcher()
    chain = "ipsec esp/tunnel/2001:db8::1-2001:db8::2/require"
    near, far = watched(
        sas_of(GCM6), policy("out", "10.1.0.0/24", "10.2.0.0/24", chain),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", chain), watcher, BOTH,
    )  # fmt: skip
    cross(near, far, INNER)
    view = PacketView()
    versions = {2: 4, 24: 6}
    for kind, (family, _, _), packet in watcher.seen:
        assert view.load(packet)
        outside = kind in {OUT | AFTER, BEFORE}
        assert (view.version, view.protocol) == ((6, 4) if outside else (4, 17))
        assert versions[family] == view.version
        assert view.length == len(packet)


@pytest.mark.parametrize(("sa", "chain", "flags"), [
    (AH, "ipsec ah/transport//require", AUTHENTIC),
    (TRANSPORT, "ipsec esp/transport//require", AUTHENTIC),
])  # fmt: skip
def test_transport_mode_has_one_header_in_all_views(sa, chain, flags):
    watcher = Watcher()
    near, far = watched(
        sas_of(sa), policy("out", "10.1.0.0/24", "10.2.0.0/24", chain),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", chain), watcher, BOTH,
    )  # fmt: skip
    cross(near, far, INNER)
    assert [packet for _, _, packet in watcher.seen] == [INNER] * 4
    assert {enc[2] for _, enc, _ in watcher.seen} == {flags}


def test_headers_in_front_of_transport_mode_are_shown():
    watcher = Watcher()
    chain = "ipsec esp/transport//require"
    near, far = watched(
        sas_of(TRANSPORT.replace("10.1.0.7 10.2.0.7", "fd01::7 fd02::7")), policy("out", "fd01::/64", "fd02::/64", chain),
        policy("in", "fd01::/64", "fd02::/64", chain), watcher, BOTH,
    )  # fmt: skip
    _, (wire,) = near.send(udp("fd01::7", "fd02::7", b"inner"))
    watcher.seen.clear()
    options = bytes((50, 0, 1, 4, 0, 0, 0, 0))
    there = wire[:4] + (len(wire) - 32).to_bytes(2, "big") + b"\x3c" + wire[7:40] + options + wire[40:]
    fate, inner = far.receive(there)
    assert fate == Fate.DONE
    assert inner[0][40:48] == b"\x11" + options[1:]
    assert [packet for _, _, packet in watcher.seen] == inner * 2


def test_each_sa_of_a_bundle_shows_its_own_packets():
    watcher = Watcher()
    sas = sas_of(TRANSPORT, AH)
    chain = "ipsec esp/transport//require ah/transport//require"
    near, far = watched(
        sas, policy("out", "10.1.0.0/24", "10.2.0.0/24", chain),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", chain), watcher, BOTH,
    )  # fmt: skip
    cross(near, far, INNER)
    assert [(kind, enc[1], packet[9]) for kind, enc, packet in watcher.seen if kind in {OUT | BEFORE, AFTER}] == [
        (OUT | BEFORE, 0x2002, 17), (OUT | BEFORE, 0x2001, 50), (AFTER, 0x2001, 50), (AFTER, 0x2002, 17),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "kinds"), [
    ("net.enc.out.ipsec_bpf_mask", 0, [BEFORE]),
    ("net.enc.out.ipsec_bpf_mask", 1, [OUT | BEFORE, BEFORE]),
    ("net.enc.out.ipsec_bpf_mask", 2, [OUT | AFTER, BEFORE]),
    ("net.enc.in.ipsec_bpf_mask", 0, [OUT | BEFORE, OUT | AFTER]),
    ("net.enc.in.ipsec_bpf_mask", 2, [OUT | BEFORE, OUT | AFTER, AFTER]),
    ("net.enc.in.ipsec_bpf_mask", 3, [OUT | BEFORE, OUT | AFTER, BEFORE, AFTER]),
])  # fmt: skip
def test_a_mask_of_enc_takes_effect_on_a_flow_that_runs(name, value, kinds):
    watcher = Watcher()
    near, far = watched(
        sas_of(GCM), policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL), watcher,
    )  # fmt: skip
    cross(near, far, INNER)
    assert [kind for kind, _, _ in watcher.seen] == [OUT | BEFORE, OUT | AFTER, BEFORE]
    for end in (near, far):
        end.tables.sysctl.set(name, value)
    watcher.seen.clear()
    cross(near, far, INNER)
    assert [kind for kind, _, _ in watcher.seen] == kinds


def test_a_watcher_of_one_sa_leaves_the_others_alone():
    watcher = Watcher(spis=(0x1002,))
    near, far = watched(
        sas_of(GCM), policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL), watcher, BOTH,
    )  # fmt: skip
    cross(near, far, INNER)
    assert watcher.seen == []
    assert watcher.room == 1000


def test_what_there_is_no_room_for_is_not_shown_and_crosses_all_the_same():
    watcher = Watcher()
    watcher.room = 1
    near, far = watched(
        sas_of(GCM), policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL), watcher, BOTH,
    )  # fmt: skip
    cross(near, far, INNER)
    assert len(watcher.seen) == 1


def test_sequence_numbers_and_window_go_on_when_a_watcher_comes_and_goes():
    sas = sas_of(GCM)
    near = make_peer(sas, [policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL)])
    far = make_peer(sas, [policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL)])
    watcher = Watcher()
    numbers = []
    replayed = b""
    for tap in (None, Tap([watcher], near.tables.sysctl), None):
        near.outbound.watch(tap)
        far.inbound.watch(tap)
        wire = cross(near, far, INNER)
        numbers.append(int.from_bytes(wire[24:28], "big"))
        replayed = replayed or wire
        assert far.receive(replayed)[0] not in set(Fate)
    assert numbers == [1, 2, 3]
    assert [kind for kind, _, _ in watcher.seen] == [OUT | BEFORE, OUT | AFTER, BEFORE]


def test_a_forged_packet_is_not_shown():
    watcher = Watcher()
    near, far = watched(
        sas_of(GCM), policy("out", "10.1.0.0/24", "10.2.0.0/24", TUNNEL),
        policy("in", "10.1.0.0/24", "10.2.0.0/24", TUNNEL), watcher, BOTH,
    )  # fmt: skip
    wire = near.send(INNER)[1][0]
    watcher.seen.clear()
    far.receive(wire[:-1] + bytes((wire[-1] ^ 1,)))
    assert watcher.seen == []
    far.receive(wire)
    assert [kind for kind, _, _ in watcher.seen] == [BEFORE, AFTER]
