"""ESP tunnels through two engines: what leaves, what arrives, and what happens on the way."""

from __future__ import annotations

import random

import pytest
from engine_peers import address, make_peer, policy, udp
from engine_tunnel import A6, B6, A, B, esp, tunnel

from ipsecq.counters import Counter, Fate
from ipsecq.engine.emit import Acquire, Expired
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.segments import split
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import Lifetime, NatTraversal

PAIRS = [
    pytest.param("10.1.0.0/24", "10.2.0.0/24", A, B, "10.1.0.2", "10.2.0.2", id="4in4"),
    pytest.param("10.1.0.0/24", "10.2.0.0/24", A6, B6, "10.1.0.2", "10.2.0.2", id="4in6"),
    pytest.param("fd01::/64", "fd02::/64", A, B, "fd01::2", "fd02::2", id="6in4"),
    pytest.param("fd01::/64", "fd02::/64", A6, B6, "fd01::2", "fd02::2", id="6in6"),
]


@pytest.mark.parametrize(("lan_a", "lan_b", "a", "b", "src", "dst"), PAIRS)
def test_what_one_gateway_seals_the_other_opens_unchanged(
    lan_a: str, lan_b: str, a: str, b: str, src: str, dst: str
) -> None:
    left, right = tunnel(lan_a, lan_b, a, b)
    for size in (0, 1, 100, 1300):
        packet = udp(src, dst, bytes(size))
        fate, wire = left.send(packet)
        assert fate == Fate.DONE
        assert len(wire) == 1
        view = PacketView()
        assert view.load(wire[0])
        assert (view.src, view.dst, view.protocol) == (address(a), address(b), 50)
        assert right.receive(wire[0]) == (Fate.DONE, [packet])
    assert left.count(Counter.ESP_OUTPUT) == right.count(Counter.ESP_INPUT) == 4
    assert left.count(Counter.FLOW_MISS) == 1


def test_traffic_that_no_policy_names_passes_as_it_is() -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    assert left.send(udp("10.1.0.2", "198.51.100.1", b"x")) == (Fate.PASS, [])


def test_default_policy_discard_drops_what_no_policy_names() -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, knobs={"net.inet.ipsec.def_policy": 0})
    assert left.send(udp("10.1.0.2", "198.51.100.1", b"x")) == (Counter.OUT_DISCARD, [])


def test_a_replayed_packet_is_dropped_and_counted() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x"))
    assert right.receive(wire[0])[0] == Fate.DONE
    assert right.receive(wire[0]) == (Counter.ESP_REPLAY, [])
    assert right.count(Counter.ESP_REPLAY) == 1


def test_a_flipped_bit_anywhere_behind_the_outer_header_is_refused_and_moves_no_window() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"payload"))
    for bit in range(20 * 8, len(wire[0]) * 8):
        forged = bytearray(wire[0])
        forged[bit // 8] ^= 1 << bit % 8
        fate, inner = right.receive(bytes(forged))
        assert inner == []
        assert fate in {Counter.ESP_BADAUTH, Counter.ESP_NOTDB, Counter.ESP_REPLAY}
    assert right.receive(wire[0])[0] == Fate.DONE


def test_an_unknown_spi_is_dropped_as_notdb() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x"))
    unknown = wire[0][:20] + b"\0\0\x77\x77" + wire[0][24:]
    assert right.receive(unknown)[0] == Counter.ESP_NOTDB


def test_a_clear_packet_that_policy_wants_protected_is_a_policy_violation() -> None:
    _, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    assert right.receive(udp("10.1.0.2", "10.2.0.2", b"x")) == (Counter.IN_POLVIO, [])


def test_a_clear_packet_may_enter_where_the_level_is_use() -> None:
    _, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, level="use")
    assert right.receive(udp("10.1.0.2", "10.2.0.2", b"x")) == (Fate.PASS, [])


def test_require_without_an_sa_holds_the_packet_and_asks_for_one() -> None:
    there = f"ipsec esp/tunnel/{A}-{B}/require"
    left = make_peer([], [policy("out", "10.1.0.0/24", "10.2.0.0/24", there)])
    packet = udp("10.1.0.2", "10.2.0.2", b"x")
    fate, wire = left.send(packet)
    assert (fate, wire) == (Fate.HOLD, [])
    wanted = left.emit.events[0]
    assert isinstance(wanted, Acquire)
    assert (wanted.protocol, wanted.src, wanted.dst) == (50, address(A), address(B))
    left.send(packet)
    assert left.emit.events == []  # the same pair is not asked for with every packet
    assert left.emit.held == wanted


def test_use_without_an_sa_asks_for_one_and_passes_in_clear() -> None:
    there = f"ipsec esp/tunnel/{A}-{B}/use"
    left = make_peer([], [policy("out", "10.1.0.0/24", "10.2.0.0/24", there)])
    fate, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x"))
    assert (fate, wire) == (Fate.PASS, [])
    assert isinstance(left.emit.events[0], Acquire)


def test_an_sa_that_arrives_is_used_by_the_next_packet() -> None:
    there = f"ipsec esp/tunnel/{A}-{B}/require"
    left = make_peer([], [policy("out", "10.1.0.0/24", "10.2.0.0/24", there)], spare=[esp(0x1001, A, B)])
    packet = udp("10.1.0.2", "10.2.0.2", b"x")
    assert left.send(packet)[0] == Fate.HOLD
    left.tables.sad.add(left.spare[0])
    assert left.send(packet)[0] == Fate.DONE
    left.tables.sad.flush()
    assert left.send(packet)[0] == Fate.HOLD


@pytest.mark.parametrize(("dfbit", "inner", "outer"), [(0, True, 0), (1, False, 1), (2, True, 1), (2, False, 0)])
def test_dfbit_decides_the_outer_df(dfbit: int, inner: bool, outer: int) -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, knobs={"net.inet.ipsec.dfbit": dfbit})
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x", df=inner))
    assert wire[0][6] >> 6 & 1 == outer


@pytest.mark.parametrize(("ecn", "inner", "outer"), [(0, 0xB9, 0xB8), (1, 0xB9, 0xB9), (1, 0xBA, 0xBA)])
def test_ecn_knob_decides_the_outer_ecn_and_dscp_is_copied(ecn: int, inner: int, outer: int) -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, knobs={"net.inet.ipsec.ecn": ecn})
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x", tos=inner))
    assert wire[0][1] == outer


@pytest.mark.parametrize(("inner", "expected"), [(0, Counter.IN_INVAL), (1, 3), (2, 3), (3, 3)])
def test_congestion_on_the_way_reaches_the_inner_packet_by_rfc_6040(inner: int, expected: int) -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x", tos=inner))
    marked = bytearray(wire[0])
    marked[1] |= 3
    fate, out = right.receive(bytes(marked))
    if isinstance(expected, Counter):
        assert fate == expected
    else:
        assert out[0][1] & 3 == expected
        view = PacketView()
        assert view.load(out[0])


def test_tfc_padding_is_removed() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, tfc_pad=600)
    packet = udp("10.1.0.2", "10.2.0.2", b"small")
    _, wire = left.send(packet)
    assert len(wire[0]) > 600
    assert right.receive(wire[0]) == (Fate.DONE, [packet])


def test_the_hard_byte_limit_is_exact_and_told_once() -> None:
    packet = udp("10.1.0.2", "10.2.0.2", bytes(72))  # 100 octets
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, hard=Lifetime(bytes=1000), soft=Lifetime(bytes=500))
    events: list[object] = []
    fates = []
    for _ in range(12):
        fates.append(left.send(packet)[0])
        events += left.emit.events
    assert fates == [Fate.DONE] * 10 + [Counter.ESP_EXPIRED] * 2
    assert [event.hard for event in events if isinstance(event, Expired)] == [False, True]


def test_esp_enable_0_drops_both_ways_and_never_passes_in_clear() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", b"x"))
    for peer in (left, right):
        peer.tables.sysctl.set("net.inet.esp.esp_enable", 0)
    assert left.send(udp("10.1.0.2", "10.2.0.2", b"x")) == (Counter.ESP_PDROPS, [])
    assert right.receive(wire[0]) == (Counter.ESP_PDROPS, [])


@pytest.mark.parametrize("size", [0, 1, 19, 20, 21, 27, 28, 40, 59])
def test_truncated_packets_never_raise(size: int) -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B)
    _, wire = left.send(udp("10.1.0.2", "10.2.0.2", bytes(100)))
    for peer in (left, right):
        assert peer.receive(wire[0][:size])[0] == Counter.IP_MALFORMED
        assert peer.send(wire[0][:size])[0] == Counter.IP_MALFORMED


def tcp_super(src: str, dst: str, data: int) -> bytes:
    """A TCP packet as a device with segmentation offload gets it."""
    segment = bytes.fromhex("9c4013890000ff00000000005018040000000000") + random.Random(data).randbytes(data)
    s, d = address(src), address(dst)
    header = ipv4.header if len(s) == 4 else ipv6.header
    return header(s, d, 6, len(segment)) + segment


@pytest.mark.parametrize(("lan_a", "lan_b", "a", "b", "src", "dst"), PAIRS)
@pytest.mark.parametrize("natt", [None, NatTraversal()], ids=["esp", "udp"])
@pytest.mark.parametrize("esn", [False, True], ids=["32", "esn"])
def test_a_super_packet_becomes_what_its_segments_would_have_become(
    lan_a: str, lan_b: str, a: str, b: str, src: str, dst: str, natt: NatTraversal | None, esn: bool
) -> None:
    whole, single = (tunnel(lan_a, lan_b, a, b, natt=natt, esn=esn)[0] for _ in range(2))
    _, right = tunnel(lan_a, lan_b, a, b, natt=natt, esn=esn)
    packet = tcp_super(src, dst, 9999)
    first = split(packet, 1200)[0]
    for left in (whole, single):
        assert left.send(first)[0] == Fate.DONE
        left.emit.clear()
    assert whole.outbound.process_super(packet, 1200, 1000.0, whole.emit) == Fate.DONE
    expected = [single.send(segment)[1][0] for segment in split(packet, 1200)]
    assert whole.emit.wire == expected
    assert [right.receive(datagram) for datagram in whole.emit.wire] == [
        (Fate.DONE, [segment]) for segment in split(packet, 1200)
    ]
    for counter in (Counter.OUT_PACKETS, Counter.OUT_BYTES, Counter.ESP_OUTPUT, Counter.ESP_OBYTES, Counter.ESP_TUNNEL):
        assert whole.count(counter) == single.count(counter)


def test_a_super_packet_is_not_decided_where_its_segments_would_not_fit_the_tunnel() -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, mtu=1300)
    packet = tcp_super("10.1.0.2", "10.2.0.2", 5000)
    left.send(split(packet, 1000)[0])
    left.emit.clear()
    assert left.outbound.process_super(packet, 1260, 1000.0, left.emit) == -1
    assert left.emit.wire == []
    assert left.count(Counter.OUT_PACKETS) == 1


def test_a_hard_limit_lets_the_segments_before_it_pass() -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, hard=Lifetime(allocations=4))
    packet = tcp_super("10.1.0.2", "10.2.0.2", 5000)
    left.send(split(packet, 1000)[0])
    left.emit.clear()
    assert left.outbound.process_super(packet, 1000, 1000.0, left.emit) == Fate.DONE
    assert len(left.emit.wire) == 3
    assert left.count(Counter.ESP_EXPIRED) == 2


@pytest.mark.parametrize(("limit", "dropped"), [(1, 4), (3, 2), (9, 0)], ids=["all", "some", "none"])
def test_the_drop_log_hears_of_a_super_packet_of_which_segments_drop(limit: int, dropped: int) -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, hard=Lifetime(allocations=limit))
    packet = tcp_super("10.1.0.2", "10.2.0.2", 4000)
    left.send(split(packet, 1000)[0])
    heard: list[tuple[str, bytes, int]] = []
    left.outbound.on_drop = lambda way, octets, reason: heard.append((way, bytes(octets), reason))
    left.emit.clear()
    left.outbound.process_super(packet, 1000, 1000.0, left.emit)
    assert left.count(Counter.ESP_EXPIRED) == dropped
    assert heard == ([("out", packet, Counter.ESP_EXPIRED)] if dropped else [])


def test_the_drop_log_hears_of_a_super_packet_that_policy_discards() -> None:
    left = make_peer([], [policy("out", "10.1.0.0/24", "10.2.0.0/24", "discard")])
    packet = tcp_super("10.1.0.2", "10.2.0.2", 4000)
    left.send(split(packet, 1000)[0])
    heard: list[tuple[str, bytes, int]] = []
    left.outbound.on_drop = lambda way, octets, reason: heard.append((way, bytes(octets), reason))
    assert left.outbound.process_super(packet, 1000, 1000.0, left.emit) == Counter.OUT_DISCARD
    assert heard == [("out", packet, Counter.OUT_DISCARD)]
    assert left.count(Counter.OUT_DISCARD) == 5
