"""Packets that are too long for a tunnel: who is told, and what goes on in fragments."""

from __future__ import annotations

from engine_peers import udp
from engine_tunnel import A6, B6, A, B, tunnel

from ipsecq.counters import Counter, Fate
from ipsecq.packet.fragments import Reassembler


def test_an_inner_packet_with_df_that_does_not_fit_is_answered_with_the_tunnels_mtu() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, mtu=1400)
    fate, wire = left.send(udp("10.1.0.2", "10.2.0.2", bytes(1360), df=True))
    assert fate == Counter.IP_TOOBIG
    error = wire[0]
    assert (error[9], error[20], error[21]) == (1, 3, 4)
    told = int.from_bytes(error[26:28], "big")
    # The MTU that was told is exact: a packet of that size fits, one octet more does not.
    fits = udp("10.1.0.2", "10.2.0.2", bytes(told - 28), df=True)
    fate, wire = left.send(fits)
    assert fate == Fate.DONE
    assert len(wire[0]) <= 1400
    assert right.receive(wire[0]) == (Fate.DONE, [fits])
    assert left.send(udp("10.1.0.2", "10.2.0.2", bytes(told - 27), df=True))[0] == Counter.IP_TOOBIG


def test_an_ipv6_sender_is_told_the_mtu_never_below_1280_and_its_packet_goes_on_in_fragments() -> None:
    left, _ = tunnel("fd01::/64", "fd02::/64", A6, B6, mtu=1300)
    fate, wire = left.send(udp("fd01::2", "fd02::2", bytes(1300)))
    assert fate == Fate.DONE
    error, *pieces = wire
    assert (error[6], error[40]) == (58, 2)
    assert int.from_bytes(error[44:48], "big") == 1280
    assert all(len(piece) <= 1300 for piece in pieces)
    # Told once; connection tracking may have joined fragments that did fit, so nothing is dropped.
    fate, wire = left.send(udp("fd01::2", "fd02::2", bytes(1300)))
    assert (fate, len(wire)) == (Fate.DONE, len(pieces))
    fate, wire = left.send(udp("fd01::2", "fd02::2", bytes(1280 - 48)))
    assert (fate, len(wire)) == (Fate.DONE, 2)  # 1280 octets may not be refused: fragments of the outer datagram
    assert all(len(piece) <= 1300 for piece in wire)


def test_an_ipv6_sender_that_may_send_fragments_that_fit_is_told_again_only_for_a_reason() -> None:
    """A socket hears of each error; its datagrams go on without any."""
    left, _ = tunnel("fd01::/64", "fd02::/64", A6, B6, mtu=1500)

    def told() -> int:
        before = left.count(Counter.OUT_TOOBIG_SENT)
        assert left.send(udp("fd01::2", "fd02::2", bytes(1440)))[0] == Fate.DONE
        return left.count(Counter.OUT_TOOBIG_SENT) - before

    assert [told() for _ in range(3)] == [1, 0, 0]
    left.now += 30
    assert told() == 0
    left.mtu = 1400  # what it was told holds no longer
    assert [told(), told()] == [1, 0]
    left.now += 61  # it may have forgotten
    assert [told(), told()] == [1, 0]


def test_a_joined_ipv6_datagram_enters_the_tunnel_in_fragments_that_a_router_behind_it_can_forward() -> None:
    left, right = tunnel("fd01::/64", "fd02::/64", A, B, mtu=1500)
    packet = udp("fd01::2", "fd02::2", bytes(4000))
    fate, wire = left.send(packet)
    assert fate == Fate.DONE
    arrived = [right.receive(piece)[1] for piece in wire[1:]]
    assert all(len(inner) == 1 and len(inner[0]) <= 1500 for inner in arrived)
    whole = Reassembler(1 << 20, 10, 60.0)
    assert [whole.add(inner[0], 0.0) for inner in arrived][-1] == packet


def test_without_df_the_outer_datagram_is_fragmented() -> None:
    left, _ = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, mtu=1400)
    fate, wire = left.send(udp("10.1.0.2", "10.2.0.2", bytes(5000)))
    assert fate == Fate.DONE
    assert len(wire) > 3
    assert all(len(piece) <= 1400 and piece[9] == 50 for piece in wire)


def test_with_dfbit_1_the_inner_packet_is_fragmented_and_every_outer_header_has_df() -> None:
    left, right = tunnel("10.1.0.0/24", "10.2.0.0/24", A, B, mtu=1400, knobs={"net.inet.ipsec.dfbit": 1})
    fate, wire = left.send(udp("10.1.0.2", "10.2.0.2", bytes(5000)))
    assert fate == Fate.DONE
    assert len(wire) > 3
    for piece in wire:
        assert len(piece) <= 1400
        assert piece[6] & 0x40
        assert right.receive(piece)[0] == Fate.DONE
