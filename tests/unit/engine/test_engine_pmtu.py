"""Which ICMP "too big" errors are believed, which are refused, and which are not about us and the kernel's to judge."""

from __future__ import annotations

import os

import pytest
from engine_peers import Peer, address, make_peer, policy, udp

from ipsecq.counters import Counter, Fate
from ipsecq.engine.emit import PathMtuLearned
from ipsecq.numbers import IPPROTO_ICMP, IPPROTO_ICMPV6, Mode, Protocol
from ipsecq.packet import checksum, icmp, ipv4, ipv6
from ipsecq.packet.fragments import fragment
from ipsecq.packet.view import DESTINATION_OPTIONS, PacketView
from ipsecq.sa.association import NatTraversal, SecurityAssociation
from ipsecq.secret import Key

ENDS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
ROUTER = {4: address("198.51.100.254"), 6: address("2001:db8:f::fe")}
SPI = 0x1001


def tunnel(version: int, *, natt: NatTraversal | None = None, knobs: dict[str, int] | None = None, mtu: int = 1500) -> Peer:
    """A gateway that sends IPv4 through an ESP tunnel of this IP version."""
    here, there = ENDS[version]
    sa = SecurityAssociation(
        Protocol.ESP, SPI, address(here), address(there), Mode.TUNNEL, natt=natt,
        encryption="aes-gcm-16", encryption_key=Key(os.urandom(20)),
    )  # fmt: skip
    wanted = policy("out", "10.1.0.0/24", "10.2.0.0/24", f"ipsec esp/tunnel/{here}-{there}/require")
    return make_peer([sa], [wanted], knobs, mtu)


def sent(peer: Peer, size: int = 1000) -> list[bytes]:
    """The datagrams that one packet becomes."""
    fate, wire = peer.send(udp("10.1.0.7", "10.2.0.7", bytes(size)))
    assert fate == Fate.DONE
    return wire


def told(peer: Peer, packet: bytes, mtu: int = 1300, quote: int = 0) -> tuple[int, list[PathMtuLearned]]:
    """Fate of a router's error about ``packet`` (``quote`` octets of it), and what was learned."""
    view = PacketView()
    assert view.load(packet)
    error = icmp.too_big(packet, mtu, ROUTER[view.version])
    if quote:
        error = quoting(error, packet[:quote])
    fate, inner = peer.receive(error)
    assert inner == []
    return fate, [event for event in peer.emit.events if isinstance(event, PathMtuLearned)]


def quoting(head: bytes, packet: bytes) -> bytes:
    """An error that begins like ``head`` and quotes ``packet``."""
    start = 20 if head[0] >> 4 == 4 else 40
    body = bytearray(head[start : start + 8] + packet)
    body[2:4] = bytes(2)
    if start == 20:
        body[2:4] = (0xFFFF - checksum.ones_complement(bytes(body))).to_bytes(2, "big")
        return ipv4.header(head[12:16], head[16:20], IPPROTO_ICMP, len(body)) + bytes(body)
    src, dst = head[8:24], head[24:40]
    body[2:4] = checksum.transport(src, dst, IPPROTO_ICMPV6, bytes(body)).to_bytes(2, "big")
    return ipv6.header(src, dst, IPPROTO_ICMPV6, len(body)) + bytes(body)


@pytest.mark.parametrize("version", [4, 6])
def test_what_a_router_says_of_a_packet_that_we_sent_is_believed(version: int) -> None:
    peer = tunnel(version)
    assert told(peer, sent(peer)[0]) == (Fate.ABSORBED, [PathMtuLearned(address(ENDS[version][1]), 1300)])
    assert (peer.count(Counter.IN_PMTU_LEARNED), peer.count(Counter.IN_PMTU_REFUSED)) == (1, 0)


def test_a_quotation_of_eight_octets_is_enough() -> None:
    peer = tunnel(4)
    assert told(peer, sent(peer)[0], quote=28)[1] == [PathMtuLearned(address("192.0.2.2"), 1300)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("wrong", ["sequence", "source"])
def test_what_names_our_sa_and_does_not_fit_it_is_refused(version: int, wrong: str) -> None:
    peer = tunnel(version)
    packet = bytearray(sent(peer)[0])
    header = 20 if version == 4 else 40
    if wrong == "sequence":
        packet[header + 4 : header + 8] = b"\x77\0\0\0"
    else:
        at = 12 if version == 4 else 8
        packet[at : at + len(ROUTER[version])] = ROUTER[version]
        if version == 4:
            ipv4.fix_checksum(packet)
    error = icmp.too_big(bytes(packet), 1300, ROUTER[version])
    assert peer.receive(error)[0] == Fate.ABSORBED
    assert peer.emit.events == []
    assert (peer.count(Counter.IN_PMTU_LEARNED), peer.count(Counter.IN_PMTU_REFUSED)) == (0, 1)


def esp(spi: int) -> bytes:
    return spi.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes(64)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("protocol", "payload"),
    [
        (50, esp(0x0BADCAFE)), (51, bytes((50, 4, 0, 0)) + esp(0x0BADCAFE)), (108, bytes((4, 0)) + b"\x77\x77" + bytes(64)),
        (17, esp(0x0BADCAFE)), (17, bytes(4) + b"IKE" * 20), (17, b"\xff"),
    ],
    ids=["esp", "ah", "ipcomp", "esp-in-udp", "ike", "keepalive"],
)  # fmt: skip
def test_an_error_about_what_no_sa_of_ours_has_sent_goes_to_the_kernel(version: int, protocol: int, payload: bytes) -> None:
    """It is about a program on this host (IKE), or a host behind our NAT, which else would never learn."""
    peer = tunnel(version, natt=NatTraversal() if protocol == 17 else None)
    sent(peer)
    here, there = ENDS[version]
    if protocol == 17:
        packet = udp(here, there, payload, sport=4500, dport=4500)
    elif version == 4:
        packet = ipv4.header(address(here), address(there), protocol, len(payload), df=True) + payload
    else:
        packet = ipv6.header(address(here), address(there), protocol, len(payload)) + payload
    assert told(peer, packet) == (Fate.PASS, [])
    assert (peer.count(Counter.IN_PMTU_LEARNED), peer.count(Counter.IN_PMTU_REFUSED)) == (0, 0)


def test_an_error_that_quotes_too_little_to_tell_goes_to_the_kernel() -> None:
    peer = tunnel(4, natt=NatTraversal())
    assert told(peer, sent(peer)[0], quote=28) == (Fate.PASS, [])


def test_an_error_about_others_is_held_against_policy_like_any_packet() -> None:
    peer = tunnel(4)
    peer.tables.spd.add(policy("in", "198.51.100.0/24", "0.0.0.0/0", "ipsec esp/tunnel/192.0.2.2-192.0.2.1/require"))
    payload = esp(0x0BADCAFE)
    packet = ipv4.header(address("192.0.2.1"), address("192.0.2.2"), 50, len(payload)) + payload
    assert told(peer, packet) == (Counter.IN_POLVIO, [])


@pytest.mark.parametrize("version", [4, 6])
def test_esp_in_udp_is_known_by_the_ports_that_are_configured(version: int) -> None:
    peer = tunnel(version, natt=NatTraversal(4501, 4501))
    packet = sent(peer)[0]
    peer.tables.natt_ports = frozenset({4500})
    assert told(peer, packet) == (Fate.PASS, [])
    peer.tables.natt_ports = frozenset({4501})
    assert told(peer, packet) == (Fate.ABSORBED, [PathMtuLearned(address(ENDS[version][1]), 1300)])


@pytest.mark.parametrize("natt", [None, NatTraversal()], ids=["esp", "esp-in-udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_the_first_fragment_of_what_we_sent_is_believed_and_a_later_one_is_left_alone(
    version: int, natt: NatTraversal | None
) -> None:
    peer = tunnel(version, natt=natt)
    first, later = sent(peer, 1460)
    assert told(peer, first) == (Fate.ABSORBED, [PathMtuLearned(address(ENDS[version][1]), 1300)])
    assert peer.receive(quoting(icmp.too_big(first, 1300, ROUTER[version]), later))[0] == Fate.PASS
    assert peer.emit.events == []
    assert (peer.count(Counter.IN_PMTU_LEARNED), peer.count(Counter.IN_PMTU_REFUSED)) == (1, 0)


def test_a_packet_behind_extension_headers_is_found() -> None:
    peer = tunnel(6)
    packet = sent(peer)[0]
    options = bytes((packet[6], 0, 1, 4, 0, 0, 0, 0))
    longer = (int.from_bytes(packet[4:6], "big") + 8).to_bytes(2, "big")
    packet = packet[:4] + longer + bytes([DESTINATION_OPTIONS]) + packet[7:40] + options + packet[40:]
    assert told(peer, packet) == (Fate.ABSORBED, [PathMtuLearned(address("2001:db8::2"), 1300)])
    pieces = fragment(packet, 1000, 7)
    assert told(peer, pieces[0])[0] == Fate.ABSORBED
    assert peer.count(Counter.IN_PMTU_LEARNED) == 2


@pytest.mark.parametrize(("version", "knob", "believed"), [(4, 576, 576), (4, 68, 100), (4, 1000, 1000), (6, 68, 1280)])
def test_min_pmtu_is_what_is_believed_at_least_and_1280_in_ipv6(version: int, knob: int, believed: int) -> None:
    peer = tunnel(version, knobs={"net.inet.ipsec.min_pmtu": knob})
    packet = sent(peer)[0]
    assert told(peer, packet, mtu=100)[1] == [PathMtuLearned(address(ENDS[version][1]), believed)]


def test_a_tunnel_over_the_least_mtu_sends_fragments_of_that_size() -> None:
    wire = sent(tunnel(4, mtu=68), 500)
    assert max(map(len, wire)) <= 68
