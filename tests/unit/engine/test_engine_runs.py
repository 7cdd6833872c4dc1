"""Packets taken in runs end as they do one by one: the same packets out, the same counters, the same SAs."""

from __future__ import annotations

import random

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
    unfolded,
    united,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecq.counters import Counter
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.engine.outbound_run import OutboundRuns
from ipsecq.numbers import Mode
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.segments import split
from ipsecq.sa.association import Lifetime, NatTraversal, SecurityAssociation


def in_runs(peer: Peer, wire: list[bytes], *, unite: bool = True) -> Emissions:
    """What a worker does with a batch."""
    if not isinstance(peer.inbound, InboundRuns):
        peer.inbound = InboundRuns(peer.tables, unite=unite)
    inbound, emit = peer.inbound, Emissions()
    at = 0
    while at < len(wire):
        taken = inbound.process_run(wire[at:], peer.now, emit)
        assert 0 <= taken <= len(wire) - at
        if not taken:
            inbound.process(wire[at], peer.now, emit)
        at += taken or 1
    return emit


def compare(one: Peer, other: Peer, wire: list[bytes], *, unite: bool = True) -> Emissions:
    """The same datagrams one by one and in runs."""
    single = Emissions()
    for datagram in wire:
        one.inbound.process(datagram, one.now, single)
    emit = in_runs(other, wire, unite=unite)
    assert unfolded(emit) == [normal(packet) for packet in single.inner]
    assert emit.events == single.events
    assert one.tables.counters.tolist() == other.tables.counters.tolist()
    assert one.tables.words.tolist() == other.tables.words.tolist()
    return emit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("udp_port", [0, 4500])
def test_a_bulk_transfer_comes_out_as_one_packet(kind, outer, inner, udp_port):
    natt = NatTraversal() if udp_port else None
    left, one, other = peers(association(kind, outer, natt=natt), outer)
    wire = [left.send(piece)[1][0] for piece in split(tcp(inner, 20 * 1348 + 100, flags=0x18), 1348)]
    emit = compare(one, other, wire)
    assert [run.number for _, run in emit.runs] == [21]
    assert b"".join(emit.runs[0][1].parts)[-100:] == tcp(inner, 20 * 1348 + 100, flags=0x18)[-100:]


def test_equal_datagrams_of_a_flow_come_out_as_one_packet():
    left, one, other = peers(association("gcm", 4), 4)
    wire = [left.send(udp(*INNER[4], bytes([n]) * 64, df=True))[1][0] for n in range(20)]
    emit = compare(one, other, wire)
    assert [(run.protocol, run.number) for _, run in emit.runs] == [(17, 20)]


def test_without_uniting_nothing_is_put_together():
    left, one, other = peers(association("gcm", 4), 4)
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 20000), 1348)]
    assert compare(one, other, wire, unite=False).runs == []


@pytest.mark.parametrize("where", ["tcp", "ip"])
def test_a_wrong_checksum_stays_wrong(where):
    left, one, other = peers(association("gcm", 4), 4)
    pieces = split(tcp(4, 20 * 1348), 1348)
    damaged = bytearray(pieces[7])
    damaged[36 if where == "tcp" else 10] ^= 1
    pieces[7] = bytes(damaged)
    emit = compare(one, other, [left.send(piece)[1][0] for piece in pieces])
    assert emit.runs == []
    assert bytes(damaged) in emit.inner


def test_what_policy_discards_is_dropped_and_counted_by_the_packet():
    left, one, other = peers(association("gcm", 4), 4)
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 20000, host=9), 1348)]
    emit = compare(one, other, wire)
    assert (emit.runs, emit.inner) == ([], [])
    assert other.count(Counter.IN_DISCARD) == len(wire)


@pytest.mark.parametrize("limit", ["allocations", "bytes"])
@pytest.mark.parametrize("which", ["soft", "hard"])
def test_limits_are_met_to_the_packet(limit, which):
    value = {"allocations": 11, "bytes": 11 * 1400 + 3}[limit]
    left, one, other = peers(association("gcm", 4, **{which: Lifetime(**{limit: value})}), 4)
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 20 * 1348), 1348)]
    for start in range(0, len(wire), 5):
        compare(one, other, wire[start : start + 5])
    assert other.count(Counter.IN_DELIVERED) == (20 if which == "soft" else 11)




@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    kind=st.sampled_from(list(KINDS)), outer=st.sampled_from([4, 6]), udp_encapsulated=st.booleans(), esn=st.booleans(),
    window=st.sampled_from([0, 32, 64, 1024]), mode=st.sampled_from([Mode.TUNNEL, Mode.ANY]),
    limits=st.sampled_from([{}, {"soft": Lifetime(bytes=20000)}, {"hard": Lifetime(allocations=40)}]),
    batches=st.lists(st.tuples(st.lists(st.tuples(STEPS, st.sampled_from([4, 6])), max_size=5), CHANGES), max_size=4),
    start=st.sampled_from([1, 100, 2**32 - 40]), unite=st.booleans(),
)  # fmt: skip
def test_any_mix_ends_as_it_does_one_by_one(
    kind, outer, udp_encapsulated, esn, window, mode, limits, batches, start, unite
):
    window = window or (64 if esn else 0)
    natt = NatTraversal(rebind=True) if udp_encapsulated else None
    sa = association(kind, outer, natt=natt, esn=esn, replay_window=window, mode=mode, **limits)
    left, one, other = peers(sa, outer)
    for peer in (left, one, other):
        slot = peer.tables.sad.inbound(sa.key).slot
        peer.tables.words[slot + 1] = start
        peer.tables.words[slot + 3] = start - 1
    seq = 1000
    for steps, changes in batches:
        wire = []
        for step, version in steps:
            for packet in sources(step, version, seq):
                wire += left.send(packet)[1]
            seq += 70000
        compare(one, other, changed(wire, changes), unite=unite)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("damage", [None, 0, 5, 11])
def test_a_super_packet_of_esp_in_udp_ends_as_its_datagrams_do(outer, damage):
    left, one, other = peers(association("gcm", outer, natt=NatTraversal()), outer)
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 11 * 1348 + 300), 1348)]
    if damage is not None:
        wire[damage] = wire[damage][:-1] + bytes([wire[damage][-1] ^ 1])
    single, emit = Emissions(), Emissions()
    for datagram in wire:
        one.inbound.process(datagram, one.now, single)
    assert InboundRuns(other.tables, unite=True).process_super(united(wire), other.now, emit)
    assert unfolded(emit) == [normal(packet) for packet in single.inner]
    assert len(single.inner) == (12 if damage is None else 11)
    assert one.tables.counters.tolist() == other.tables.counters.tolist()
    assert one.tables.words.tolist() == other.tables.words.tolist()


@pytest.mark.parametrize("damage", [None, 0, 5])
def test_a_super_packet_behind_an_extension_header_ends_as_its_datagrams_do(damage):
    left, one, other = peers(association("gcm", 6, natt=NatTraversal()), 6)
    wire = [left.send(udp(*INNER[4], bytes([n]) * 700))[1][0] for n in range(8)]
    if damage is not None:
        wire[damage] = wire[damage][:-1] + bytes([wire[damage][-1] ^ 1])
    options = bytes((17, 0, 1, 4, 0, 0, 0, 0))

    def extended(packet):
        return packet[:4] + (len(packet) - 32).to_bytes(2) + b"\x3c" + packet[7:40] + options + packet[40:]

    single, emit = Emissions(), Emissions()
    for datagram in wire:
        one.inbound.process(extended(datagram), one.now, single)
    assert InboundRuns(other.tables).process_super(extended(united(wire)), other.now, emit)
    assert emit.inner == single.inner
    assert len(single.inner) == (8 if damage is None else 7)
    assert one.tables.counters.tolist() == other.tables.counters.tolist()
    assert one.tables.words.tolist() == other.tables.words.tolist()


@pytest.mark.parametrize("gap", [3, 11])
def test_a_super_packet_with_a_gap_is_left_to_the_kernel_untouched(gap):
    left, _, other = peers(association("gcm", 4, natt=NatTraversal()), 4)
    wire = [left.send(piece)[1][0] for piece in split(tcp(4, 12 * 1348), 1348)]
    before = other.tables.counters.tolist(), other.tables.words.tolist()
    inbound, emit = InboundRuns(other.tables, unite=True), Emissions()
    assert not inbound.process_super(united(wire[: gap - 1] + wire[gap:]), other.now, emit)
    assert not inbound.process_super(udp("192.0.2.1", "192.0.2.2", bytes(5000), dport=4500), other.now, emit)
    assert not inbound.process_super(tcp(4, 5000), other.now, emit)
    assert (emit.inner, emit.runs) == ([], [])
    assert before == (other.tables.counters.tolist(), other.tables.words.tolist())


def bursting(sa: SecurityAssociation, outer: int) -> tuple[Peer, Peer]:
    """Two senders alike, one of which makes bursts."""
    out = [policy("out", *LANS[version], f"ipsec esp/tunnel/{'-'.join(OUTER[outer])}/require") for version in (4, 6)]
    single, bursts = make_peer([sa], out, mtu=1500), make_peer([sa], out, mtu=1500)
    bursts.tables.burst_ports = frozenset({4500})
    for peer in (single, bursts):
        peer.send(udp(*INNER[4], b"first"))  # the decision is made
        peer.send(tcp(4, 10))
        peer.send(tcp(6, 10))
    return single, bursts


@pytest.mark.parametrize("kind", ["gcm", "chacha"])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("size", [1300, 500])
def test_bursts_are_the_datagrams_that_segments_become_one_by_one(kind, outer, inner, size):
    single, bursts = bursting(association(kind, outer, natt=NatTraversal(dport=30000)), outer)
    packet = tcp(inner, 50000, flags=0x18, tos=0x28)
    wire = [datagram for piece in split(packet, size) for datagram in single.send(piece)[1]]
    emit = Emissions()
    assert bursts.outbound.process_super(packet, size, bursts.now, emit) == 1
    made = [burst for _, burst in emit.bursts]
    assert emit.wire == []
    assert sum(burst.number for burst in made) == len(wire)
    assert all(burst.number <= 64 and len(burst.data) <= 65487 for burst in made)
    assert [datagram for burst in made for datagram in burst.datagrams()] == wire
    assert single.tables.counters.tolist()[128:160] == bursts.tables.counters.tolist()[128:160]
    assert single.tables.words.tolist() == bursts.tables.words.tolist()


def test_an_sa_of_another_port_makes_no_bursts():
    _, bursts = bursting(association("gcm", 4, natt=NatTraversal(sport=4501)), 4)
    emit = Emissions()
    assert bursts.outbound.process_super(tcp(4, 50000), 1300, bursts.now, emit) == 1
    assert (emit.bursts, len(emit.wire)) == ([], 39)


OUT_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["udp", "tcp", "icmp", "fragment", "long"]), st.integers(1, 9), st.integers(0, 40),
        st.sampled_from([0, 0x28]), st.booleans(),
    ),
    max_size=6,
)  # fmt: skip


def outgoing(step, version: int) -> list[bytes]:
    """The packets of one flow."""
    kind, number, size, tos, df = step
    if kind == "udp":
        return [udp(*INNER[version], random.Random(n).randbytes(size), tos=tos, df=df) for n in range(number)]
    if kind == "tcp":
        return [tcp(version, size, seq=5000 + n * size, tos=tos) for n in range(number)]
    if kind == "long":
        return [udp(*INNER[version], bytes(1480), df=df)] * number
    src, dst = (address(text) for text in INNER[version])
    if kind == "fragment" and version == 4:
        packet = bytearray(ipv4.header(src, dst, 17, size + 8, tos=tos) + bytes(size + 8))
        packet[6] = 0x20
        ipv4.fix_checksum(packet)
        return [bytes(packet)] * number
    header = ipv4.header if version == 4 else ipv6.header
    return [header(src, dst, 1 if version == 4 else 58, size + 8) + bytes(size + 8)] * number


def unfinished(packet: bytes) -> bytes:
    """The packet as a stack gives it to a device that makes checksums."""
    at = 20 if packet[0] >> 4 == 4 else 40
    if packet[9 if at == 20 else 6] not in {6, 17} or (at == 20 and packet[6] & 0x3F):
        return packet
    field = at + (16 if packet[9 if at == 20 else 6] == 6 else 6)
    return packet[:field] + b"\x12\x34" + packet[field + 2 :]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(list(KINDS)), outer=st.sampled_from([4, 6]), inner=st.sampled_from([4, 6]), steps=OUT_STEPS,
    natt=st.sampled_from([None, NatTraversal(), NatTraversal(sport=4501)]), esn=st.booleans(), partial=st.booleans(),
    limits=st.sampled_from([{}, {"soft": Lifetime(bytes=900)}, {"hard": Lifetime(allocations=17)}]),
)  # fmt: skip
def test_equal_packets_sealed_in_one_go_are_those_sealed_one_by_one(
    kind, outer, inner, steps, natt, esn, partial, limits
):
    sa = association(kind, outer, natt=natt, esn=esn, **limits)
    out = [policy("out", *LANS[version], f"ipsec esp/tunnel/{'-'.join(OUTER[outer])}/require") for version in (4, 6)]
    one, other = make_peer([sa], out), make_peer([sa], out)
    other.tables.burst_ports = frozenset({4500})
    other.outbound = OutboundRuns(other.tables, lambda _: other.mtu, lambda dst: bytes(len(dst)))
    one.outbound = OutboundRuns(one.tables, lambda _: one.mtu, lambda dst: bytes(len(dst)))
    packets = [packet for step in steps for packet in outgoing(step, inner)]
    single, emit = Emissions(), Emissions()
    for packet in packets:
        one.outbound.process(packet, one.now, single)
    at, made = 0, []
    while at < len(packets):
        before = len(emit.bursts), len(emit.wire)
        batch = [unfinished(packet) for packet in packets[at:]] if partial else packets[at:]
        taken = other.outbound.process_run(batch, partial, other.now, emit)
        if not taken:
            other.outbound.process(packets[at], other.now, emit)
        made += emit.wire[before[1] :] + [d for _, burst in emit.bursts[before[0] :] for d in burst.datagrams()]
        at += taken or 1
    if kind == "cbc":  # random IVs
        assert list(map(len, made)) == list(map(len, single.wire))
    else:
        assert made == single.wire
    assert emit.events == single.events
    assert one.tables.counters.tolist() == other.tables.counters.tolist()
    assert one.tables.words.tolist() == other.tables.words.tolist()


def test_small_datagrams_of_a_flow_leave_in_one_burst():
    _, bursts = bursting(association("gcm", 4, natt=NatTraversal()), 4)
    outbound, emit = OutboundRuns(bursts.tables, lambda _: 1500, lambda dst: bytes(len(dst))), Emissions()
    packets = [udp(*INNER[4], bytes([n]) * 64) for n in range(20)]
    outbound.process(packets[0], bursts.now, emit)
    emit.clear()
    assert outbound.process_run(packets, False, bursts.now, emit) == 20
    assert [(place, burst.number) for place, burst in emit.bursts] == [(0, 20)]
