"""Packets that the fast path takes end as they do in the engine: the same octets out, the same counters, the same SAs."""

from __future__ import annotations

import os
import select
import time

import pytest
from engine_peers import Peer, address, make_peer, policy, udp
from engine_traffic import (
    CHANGES,
    INNER,
    KINDS,
    LANS,
    OUTER,
    STEPS,
    association,
    changed,
    normal,
    peers,
    sources,
    tcp,
    united,
)
from fast_peer import Fast, alike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecq import fastpath
from ipsecq.counters import Counter
from ipsecq.crypto import cipher
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.numbers import Mode
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.checksum import verify_transport
from ipsecq.packet.segments import split
from ipsecq.sa.association import Lifetime, NatTraversal
from ipsecq.transforms.esp import EspTransform


def senders(sa, outer: int, **more) -> tuple[Peer, Fast]:
    out = [policy("out", *LANS[version], f"ipsec esp/tunnel/{'-'.join(OUTER[outer])}/require") for version in (4, 6)]
    single, other = (make_peer([sa], out, **more) for _ in range(2))
    other.tables.burst_ports = frozenset({4500})
    return single, Fast(other)


@pytest.mark.parametrize("kind", ["gcm", "chacha"])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("udp_encapsulated", [False, True])
@pytest.mark.parametrize("dfbit", [0, 1, 2])
def test_a_flow_that_is_known_is_sealed_to_the_octet(kind, outer, inner, udp_encapsulated, dfbit):
    sa = association(kind, outer, natt=NatTraversal(dport=30000) if udp_encapsulated else None)
    single, fast = senders(sa, outer, knobs={"net.inet.ipsec.dfbit": dfbit, "net.inet.ipsec.ecn": 1})
    packets = [
        *[tcp(inner, size, flags=flags, tos=tos, seq=size) for size in (0, 1, 2, 3, 700, 1300) for flags, tos in
          ((0x10, 0), (0x18, 0x2B))],
        *[udp(*INNER[inner], bytes([n]) * n, df=n % 2 == 0) for n in range(40)],
        *[udp(*INNER[inner], bytes(64)) for n in range(70)],
    ]  # fmt: skip
    wire = [datagram for packet in packets for datagram in single.send(packet)[1]]
    made = [datagram for packet in packets for datagram in fast.send(packet)] + fast.finish()
    assert made == wire
    assert fast.taken == len(packets) - 2
    alike(single, fast.peer)


@pytest.mark.parametrize("kind", ["gcm", "chacha"])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("udp_encapsulated", [False, True])
@pytest.mark.parametrize("size", [1300, 501, 33])
def test_a_super_packet_becomes_its_segments_to_the_octet(kind, outer, inner, udp_encapsulated, size):
    sa = association(kind, outer, natt=NatTraversal() if udp_encapsulated else None)
    single, fast = senders(sa, outer)
    first = tcp(inner, 10)
    wire = single.send(first)[1]
    made = fast.send(first)
    for flags, length in ((0x18, 40000), (0x11, 39999), (0x90, 13000), (0x10, 3 * size)):
        packet = tcp(inner, length, flags=flags, tos=2, seq=2**32 - 5000, options=b"\1\1\x08\n" + bytes(8))
        wire += [datagram for piece in split(packet, size) for datagram in single.send(piece)[1]]
        made += fast.send(packet, size)
    assert made + fast.finish() == wire
    assert fast.taken == 4
    alike(single, fast.peer)


def test_a_checksum_that_is_not_filled_in_is():
    single, fast = senders(association("gcm", 4), 4)
    for inner in (4, 6):
        for packet, place in ((tcp(inner, 501), 16), (udp(*INNER[inner], b"odd"), 6)):
            at = (20 if inner == 4 else 40) + place
            unfinished = packet[:at] + b"\x12\x34" + packet[at + 2 :]
            wire = single.send(packet)[1] + single.send(packet)[1]
            assert fast.send(packet) + fast.send(unfinished, unfinished=True) + fast.finish() == wire
    assert fast.taken == 4


@pytest.mark.parametrize("limit", ["allocations", "bytes"])
@pytest.mark.parametrize("which", ["soft", "hard"])
@pytest.mark.parametrize("size", [0, 100])
def test_limits_on_the_way_out_are_met_to_the_packet(limit, which, size):
    sa = association("gcm", 4, **{which: Lifetime(**{limit: {"allocations": 23, "bytes": 23 * 140 + 5}[limit]})})
    single, fast = senders(sa, 4)
    packet = tcp(4, 700 if size else 100)
    wire, made = [], []
    for _ in range(12 if size else 40):
        wire += [datagram for piece in (split(packet, size) if size else [packet]) for datagram in single.send(piece)[1]]
        made += fast.send(packet, size)
    assert made + fast.finish() == wire
    assert fast.taken > 1
    alike(single, fast.peer)


def echo(version: int, identifier: int) -> bytes:
    source, destination = map(address, INNER[version])
    message = bytes([8 if version == 4 else 128, 0, 0, 0]) + identifier.to_bytes(2, "big") + bytes(50)
    if version == 4:
        return ipv4.header(source, destination, 1, len(message), identification=7) + message
    return ipv6.header(source, destination, 58, len(message)) + message


@pytest.mark.parametrize("inner", [4, 6])
def test_what_begins_a_connection_in_a_known_flow_is_the_engines(inner):
    """Its verdict has to come before its datagram: by it connection tracking knows the answer."""
    single, fast = senders(association("gcm", 4), 4)
    pings = [echo(inner, identifier) for identifier in (1, 1, 1, 2, 2, 1, 3, 3)]
    again = [tcp(inner, 0, flags=flags) for flags in (0x10, 0x10, 0x02, 0x12, 0x10)]
    made = []
    for packets, taken in ((pings, [0, 0, 1, 1, 2, 2, 2, 3]), (again, [3, 4, 4, 4, 5])):
        for packet, count in zip(packets, taken, strict=True):
            made += fast.send(packet)
            assert fast.taken == count
    assert made + fast.finish() == [datagram for packet in pings + again for datagram in single.send(packet)[1]]
    alike(single, fast.peer)


def test_what_changes_is_noticed_at_the_next_packet():
    _, fast = senders(association("gcm", 4), 4)
    packet = udp(*INNER[4], bytes(1000), df=True)
    for _ in range(3):
        fast.send(packet)
    assert fast.taken == 2
    fast.peer.tables.sysctl.set("net.inet.ipsec.dfbit", 1)
    fast.send(packet)
    assert fast.taken == 2
    fast.finish()
    fast.send(packet)
    assert fast.taken == 3
    fast.paths.version += 1  # a route
    fast.peer.mtu = 900
    fast.send(packet)
    assert fast.taken == 3
    assert fast.peer.count(Counter.IP_TOOBIG) == 1
    fast.peer.mtu = 1500
    fast.send(packet)
    fast.peer.now += 2.0  # what was known about the path is old
    fast.send(packet)
    assert fast.taken == 3
    fast.send(packet)
    assert fast.taken == 4
    fast.finish()
    fast.peer.tables.sad.flush()
    assert fast.send(packet) + fast.finish() == []
    assert fast.taken == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("udp_encapsulated", [False, True])
def test_a_bulk_transfer_is_opened_and_put_together(kind, outer, inner, udp_encapsulated):
    left, one, other = peers(association(kind, outer, natt=NatTraversal() if udp_encapsulated else None), outer)
    fast = Fast(other)
    packets = [*split(tcp(inner, 20 * 1348 + 100, flags=0x18), 1348), *[udp(*INNER[inner], bytes(64), df=True)] * 30]
    wire = [left.send(piece)[1][0] for piece in packets]
    single = Emissions()
    for datagram in wire:
        one.inbound.process(datagram, one.now, single)
    assert [normal(packet) for packet in fast.receive(wire)] == [normal(packet) for packet in single.inner]
    assert fast.taken == (0 if kind == "cbc" else len(wire) - 3)
    if kind != "cbc":
        assert other.count(Counter.COALESCED) > 40
    alike(one, other)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("damage", [None, 0, 5, 11])
def test_a_super_packet_of_esp_in_udp_ends_as_its_datagrams_do(outer, damage):
    left, one, other = peers(association("gcm", outer, natt=NatTraversal()), outer)
    other.inbound = InboundRuns(other.tables)
    fast = Fast(other)
    first = [left.send(piece)[1][0] for piece in split(tcp(4, 3000), 1000)]
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 11 * 1348 + 300, seq=4000), 1348)]
    if damage is not None:
        wire[damage] = wire[damage][:-1] + bytes([wire[damage][-1] ^ 1])
    single = Emissions()
    for datagram in [*first, *wire]:
        one.inbound.process(datagram, one.now, single)
    got = fast.receive(first) + fast.receive([united(wire)], gso=True)
    assert [normal(packet) for packet in got] == [normal(packet) for packet in single.inner]
    assert len(single.inner) == 3 + (12 if damage is None else 11)
    assert fast.taken == 2
    alike(one, other)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    kind=st.sampled_from(["gcm", "chacha"]), outer=st.sampled_from([4, 6]), udp_encapsulated=st.booleans(),
    esn=st.booleans(), window=st.sampled_from([0, 32, 64, 1024]), mode=st.sampled_from([Mode.TUNNEL, Mode.ANY]),
    limits=st.sampled_from([{}, {"soft": Lifetime(bytes=20000)}, {"hard": Lifetime(allocations=40)}]),
    batches=st.lists(st.tuples(st.lists(st.tuples(STEPS, st.sampled_from([4, 6])), max_size=5), CHANGES), max_size=4),
    start=st.sampled_from([1, 100, 2**32 - 40]),
)  # fmt: skip
def test_any_mix_ends_as_it_does_in_the_engine(kind, outer, udp_encapsulated, esn, window, mode, limits, batches, start):
    """On the way out and on the way in; what the network has changed in between goes to both receivers."""
    natt = NatTraversal(rebind=True) if udp_encapsulated else None
    sa = association(kind, outer, natt=natt, esn=esn, replay_window=window or (64 if esn else 0), mode=mode, **limits)
    left, one, other = peers(sa, outer)
    sender = Fast(peers(sa, outer)[0])
    sender.peer.tables.burst_ports = frozenset({4500})
    fast = Fast(other)
    for peer in (left, one, other, sender.peer):
        slot = peer.tables.sad.inbound(sa.key).slot
        peer.tables.words[slot + 1] = start
        peer.tables.words[slot + 3] = start - 1
    seq = 1000
    for steps, changes in batches:
        wire, made = [], []
        for step, version in steps:
            for packet in sources(step, version, seq):
                wire += left.send(packet)[1]
                made += sender.send(packet)
            seq += 70000
        assert made + sender.finish() == wire
        alike(left, sender.peer)
        arriving = changed(wire, changes)
        single = Emissions()
        for datagram in arriving:
            one.inbound.process(datagram, one.now, single)
        assert [normal(packet) for packet in fast.receive(arriving)] == [normal(packet) for packet in single.inner]
        assert fast.events == single.events
        fast.events = []
        alike(one, other)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_tfc_padding_is_left_to_the_engine_and_taken_off_as_there(outer, inner):
    sa = association("gcm", outer, tfc_pad=1500)
    single, fast = senders(sa, outer)
    packets = [udp(*INNER[inner], bytes([n]) * n, df=n % 2 == 0) for n in range(40)]
    packets += [tcp(inner, 1200, seq=n) for n in (1, 2)]
    wire, made = [], []
    for fast.peer.mtu in (1500, 1400):
        single.mtu = fast.peer.mtu
        fast.paths.version += 1
        wire += [datagram for packet in packets for datagram in single.send(packet)[1]]
        made += [datagram for packet in packets for datagram in fast.send(packet)] + fast.finish()
    assert made == wire
    assert max(map(len, wire)) <= 1500
    assert fast.taken == 0
    alike(single, fast.peer)
    _, one, other = peers(sa, outer)
    emit = Emissions()
    for datagram in wire:
        one.inbound.process(datagram, one.now, emit)
    receiver = Fast(other)
    assert [normal(packet) for packet in receiver.receive(wire)] == [normal(packet) for packet in emit.inner]
    assert len(emit.inner) == 2 * len(packets)
    alike(one, receiver.peer)


@pytest.mark.parametrize("policy_knob", [0, 1])
def test_transport_mode_behind_a_nat_is_left_to_the_engine_under_an_sa_of_either_mode(policy_knob):
    near, far = OUTER[4]
    sa = association("gcm", 4, natt=NatTraversal(), mode=Mode.ANY)
    tunnel = policy("in", *LANS[4], f"ipsec esp/tunnel/{near}-{far}/require")
    knobs = {"net.inet.ipsec.natt_cksum_policy": policy_knob}
    here = policy("in", f"{near}/32", f"{far}/32", "ipsec esp/transport//require")
    one, other = (make_peer([sa], [tunnel, here], knobs) for _ in range(2))
    fast = Fast(other)
    seal = EspTransform(sa.spi, cipher.build(sa.encryption, sa.encryption_key, None, None)).seal
    segment = udp("10.9.9.9", far, bytes(200))[20:]
    arriving = []
    for number in range(1, 21):
        payload, follows = [(udp(*INNER[4], b"inside"), 4), (segment, 17)][number % 2]
        body = seal(payload, follows, number)
        arriving.append(udp(near, far, body, sport=4500, dport=4500))
    emit = Emissions()
    for datagram in arriving:
        one.inbound.process(datagram, one.now, emit)
    assert fast.receive(arriving) == emit.inner
    assert len(emit.inner) == 20
    assert all(verify_transport(packet) for packet in emit.inner)
    assert fast.taken == 9
    alike(one, other)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x45\x00", b"\x60\x00"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_arbitrary_octets_are_left_to_the_engine(octets, start, gso):
    left, _, other = peers(association("gcm", 4, natt=NatTraversal()), 4)
    fast = Fast(other)
    fast.receive([left.send(udp(*INNER[4], b"first"))[1][0]])
    packet = start + octets
    before = other.tables.counters.tolist(), other.tables.words.tolist()
    assert fast.path.opener.open(packet, gso, 1000.0) == 0
    assert not fast.path.sealer.seal(packet, False, gso, 0, 0, 0, 1000.0)
    assert before == (other.tables.counters.tolist(), other.tables.words.tolist())


def test_a_worker_without_packets_still_gives_signs_of_life():
    fast = Fast(peers(association("gcm", 4), 4)[0])
    before = fast.peer.count(Counter.HEARTBEAT)
    with select.epoll() as poll:
        for _ in range(20):  # whoever comes to it too late has no time left to wait in
            assert fast.path.serve(poll.fileno(), time.monotonic() + 0.05) == (-1, 0)
            if fast.peer.count(Counter.HEARTBEAT) > before:
                break
    assert fast.peer.count(Counter.HEARTBEAT) == before + 1


def test_what_is_no_queue_is_left_to_others():
    fast = Fast(peers(association("gcm", 4), 4)[0])
    readable, writable = os.pipe()
    try:
        os.write(writable, b"x")
        with select.epoll() as poll:
            poll.register(readable, select.EPOLLIN)
            assert fast.path.serve(poll.fileno(), time.monotonic() + 10.0) == (readable, 0)
    finally:
        os.close(readable)
        os.close(writable)


@pytest.mark.parametrize("esn", [False, True])
@pytest.mark.parametrize("debug", [0, 1])
def test_replays_and_forgeries_are_dropped_at_once_unless_somebody_wants_to_hear_of_them(esn, debug):
    left, one, other = peers(association("gcm", 4, esn=esn), 4)
    for peer in (one, other):
        peer.tables.sysctl.set("net.inet.ipsec.debug", debug)
    fast = Fast(other)
    wire = [left.send(udp(*INNER[4], bytes([n])))[1][0] for n in range(20)]
    forged = [datagram[:-1] + bytes([datagram[-1] ^ 1]) for datagram in wire[10:]]
    everything = [*wire[:10], *wire[:5], *forged, *wire[10:]]
    for datagram in everything:
        one.inbound.process(datagram, one.now, Emissions())
    fast.receive(everything)
    alike(one, other)
    assert (other.count(Counter.ESP_REPLAY), other.count(Counter.ESP_BADAUTH)) == (5, 10)
    assert fast.taken == 18 + (0 if debug else 10 if esn else 15)


def test_it_is_here_where_the_tests_run():
    """Left out where a compiler is missing; what `make test` installs has one, so nothing here may pass by not running."""
    assert fastpath.active, fastpath.missing


def test_what_is_left_of_a_super_packet_is_handed_out_once():
    """Asked again, before it goes on, it has nothing: what stands behind that packet is whole."""
    fast = Fast(peers(association("gcm", 4), 4)[0])
    fast.path._path.partial, fast.path.opener.rest = True, [b"datagram"]
    assert fast.path.take_left() == [b"datagram"]
    assert fast.path.take_left() is None
