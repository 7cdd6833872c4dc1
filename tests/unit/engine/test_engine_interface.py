"""Route-based tunnels in the engine: an interface's own policy seals what is routed into it; only its SAs open into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_peers import Peer, address, make_peer, policy, udp

from ipsecq.counters import Counter, Fate
from ipsecq.engine.emit import Acquire, Emissions
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet import ipv4
from ipsecq.packet.checksum import complete, verify_transport
from ipsecq.packet.segments import split
from ipsecq.policy import setpolicy
from ipsecq.policy.interface import POLICY_ID, Interface
from ipsecq.policy.sockets import SocketPolicy, SocketRule
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key

ENDS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
INNER = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd01::2", "fd02::2")}
REQID = 100


def esp(spi: int, src: str, dst: str, *, reqid: int = REQID, mode: Mode = Mode.TUNNEL) -> SecurityAssociation:
    return SecurityAssociation(
        Protocol.ESP, spi, address(src), address(dst), mode, reqid=reqid, encryption="aes-gcm-16",
        encryption_key=Key(bytes(range(spi & 0xFF, (spi & 0xFF) + 20))), replay_window=64,
    )  # fmt: skip


def interface(local: str, remote: str) -> Interface:
    return Interface("ipsec0", address(local), address(remote), REQID, 1400)


def pair(outer: int, *, sas=None, policies=(), knobs=None) -> tuple[Peer, Peer, Interface]:
    """Two ends with an interface each, and that of the left one, which the packets are routed into."""
    left_end, right_end = ENDS[outer]
    if sas is None:
        sas = [esp(0x1001, left_end, right_end), esp(0x1002, right_end, left_end)]
    left, right = (make_peer(sas, list(policies), knobs) for _ in range(2))
    own, other = interface(left_end, right_end), interface(right_end, left_end)
    left.tables.interfaces[REQID], right.tables.interfaces[REQID] = own, other
    return left, right, own


def routed(peer: Peer, own: Interface, packet: bytes) -> tuple[int, list[bytes]]:
    peer.outbound.through(own)
    try:
        return peer.send(packet)
    finally:
        peer.outbound.through(None)


def entered(peer: Peer) -> list[bytes]:
    return peer.emit.interfaces[REQID].inner if REQID in peer.emit.interfaces else []


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_what_is_routed_into_an_interface_enters_from_its_twin_with_no_policy_in_the_spd(outer, inner):
    left, right, own = pair(outer)
    packet = udp(*INNER[inner], bytes(500))
    fate, (sealed,) = routed(left, own, packet)
    assert fate == Fate.DONE
    assert packet[-400:] not in sealed
    assert right.receive(sealed) == (Fate.DONE, [])
    assert entered(right) == [packet]


def test_the_spd_has_no_say_about_an_interface():
    """Nor has what it thinks of the same flow outside of the interface."""
    block = [policy("out", "0.0.0.0/0", "0.0.0.0/0", "discard"), policy("in", "0.0.0.0/0", "0.0.0.0/0", "discard")]
    left, right, own = pair(4, policies=block, knobs={"net.inet.ipsec.def_policy": 0})
    packet = udp(*INNER[4], b"flow")
    for _ in range(2):
        assert left.send(packet) == (Counter.OUT_DISCARD, [])
        fate, (sealed,) = routed(left, own, packet)
        assert fate == Fate.DONE
        right.receive(sealed)
        assert entered(right) == [packet]


@pytest.mark.parametrize("there", [[], [7], [0]])
def test_without_an_sa_of_its_reqid_a_packet_waits_and_nothing_leaves(there):
    sas = [esp(0x1001 + reqid, *ENDS[4], reqid=reqid) for reqid in there]
    left, _, own = pair(4, sas=sas)
    fate, wire = routed(left, own, udp(*INNER[4], b"x"))
    assert (fate, wire) == (Fate.HOLD, [])
    near, far = (address(text) for text in ENDS[4])
    wanted = Acquire(Protocol.ESP, Mode.TUNNEL, near, far, REQID, POLICY_ID | REQID << 1)
    assert left.emit.events == [wanted]
    assert left.emit.held == wanted
    assert [each.id for each in own.policies()] == [wanted.policy, wanted.policy + 1]


@pytest.mark.parametrize(
    "stray",
    [
        esp(0x3001, "192.0.2.77", "192.0.2.2"),
        esp(0x3001, "192.0.2.1", "192.0.2.2", mode=Mode.TRANSPORT),
    ],
    ids=["other-ends", "transport"],
)
def test_an_sa_with_its_reqid_that_is_not_its_own_opens_nothing(stray):
    level = "require" if stray.mode is Mode.TUNNEL else "unique:100"
    ends = "192.0.2.77-192.0.2.2" if stray.mode is Mode.TUNNEL else ""
    mode = "tunnel" if stray.mode is Mode.TUNNEL else "transport"
    source, target = INNER[4] if stray.mode is Mode.TUNNEL else ENDS[4]
    sender = make_peer([stray], [policy("out", source, target, f"ipsec esp/{mode}/{ends}/{level}")])
    _, right, _ = pair(4, sas=[stray])
    fate, (sealed,) = sender.send(udp(source, target, b"x"))
    assert fate == Fate.DONE
    assert right.receive(sealed) == (Counter.IN_INTERFACE, [])
    assert entered(right) == []
    assert right.count(Counter.IN_INTERFACE) == 1


def test_an_sa_with_another_reqid_does_not_enter_from_the_interface():
    other = esp(0x3001, *ENDS[4], reqid=7)
    sender = make_peer([other], [policy("out", *INNER[4], f"ipsec esp/tunnel/{'-'.join(ENDS[4])}/unique:7")])
    _, right, _ = pair(4, sas=[other])
    packet = udp(*INNER[4], b"x")
    _, (sealed,) = sender.send(packet)
    assert right.receive(sealed) == (Fate.DONE, [packet])
    assert entered(right) == []


def tcp(size: int) -> bytes:
    src, dst = (address(text) for text in INNER[4])
    segment = bytes.fromhex("9c40005000000001000000025010100000000000") + bytes(size)
    return complete(ipv4.header(src, dst, 6, len(segment), df=True) + segment)


def test_a_super_packet_goes_through_whole_and_comes_out_united():
    left, right, own = pair(4)
    packet = tcp(30 * 1300)
    routed(left, own, split(packet, 1300)[0])  # the flow is known
    left.emit.clear()
    left.outbound.through(own)
    assert left.outbound.process_super(packet, 1300, left.now, left.emit) == Fate.DONE
    left.outbound.through(None)
    wire = list(left.emit.wire)
    assert len(wire) == 30
    inbound, emit = InboundRuns(right.tables, unite=True), Emissions()
    assert inbound.process_run(wire, right.now, emit) == 30
    assert (emit.inner, emit.runs) == ([], [])
    ((place, run),) = emit.interfaces[REQID].runs
    assert (place, run.number) == (0, 30)
    assert right.count(Counter.IN_DELIVERED) == 30


def test_a_run_of_an_sa_that_is_not_its_own_is_dropped_packet_by_packet_in_the_account():
    left, right, own = pair(4)
    right.tables.interfaces[REQID] = interface("192.0.2.2", "192.0.2.99")
    packet = tcp(30 * 1300)
    wire = [routed(left, own, piece)[1][0] for piece in split(packet, 1300)]
    inbound, emit = InboundRuns(right.tables, unite=True), Emissions()
    assert inbound.process_run(wire, right.now, emit) == 30
    assert (emit.inner, emit.runs, emit.interfaces) == ([], [], {})
    assert right.count(Counter.IN_INTERFACE) == 30


def test_a_packet_with_df_that_does_not_fit_the_path_is_answered_as_in_a_policys_tunnel():
    left, _, own = pair(4)
    left.mtu = 1000
    fate, (error,) = routed(left, own, udp(*INNER[4], bytes(1200), df=True))
    assert fate == Counter.IP_TOOBIG
    assert (error[9], error[20], error[21]) == (1, 3, 4)
    assert 940 <= int.from_bytes(error[26:28], "big") <= 1000 - 54


def test_the_segments_checksums_are_complete():
    left, right, own = pair(4)
    packet = tcp(2600)
    routed(left, own, split(packet, 1300)[0])
    broken = packet[:36] + b"\x12\x34" + packet[38:]  # as a device's offload leaves it
    left.emit.clear()
    left.outbound.through(own)
    left.outbound.process_super(broken, 1300, left.now, left.emit)
    for sealed in list(left.emit.wire):
        right.receive(sealed)
        (inner,) = entered(right)
        assert verify_transport(inner)


def test_a_changed_interface_forgets_its_flows():
    left, _, own = pair(4)
    packet = udp(*INNER[4], b"x")
    assert routed(left, own, packet)[0] == Fate.DONE
    left.outbound.forget_interface(own)
    moved = replace(own, remote=address("192.0.2.99"))
    assert routed(left, moved, packet) == (Fate.HOLD, [])


@pytest.mark.parametrize(("rule", "fate"), [("discard", Counter.IN_DISCARD), ("none", Fate.DONE)])
def test_the_policy_of_the_socket_that_gets_it_holds_for_a_packet_that_enters_from_an_interface(rule, fate):
    left, right, own = pair(4)
    right.tables.spd.put_socket(SocketPolicy(1, SocketRule(setpolicy.parse(f"in {rule}"), privileged=True)))
    right.tables.socket_of = lambda src, dst, protocol, sport, dport: 1 if dport == 2000 else 0
    for port, wanted in ((2000, fate), (2001, Fate.DONE)):
        _, (sealed,) = routed(left, own, udp(*INNER[4], b"x", dport=port))
        assert right.receive(sealed)[0] == wanted
        assert len(entered(right)) == (wanted == Fate.DONE)
