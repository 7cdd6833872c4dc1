"""Sequence numbers through two engines: the high half of ESN, the end of the low half, a peer that moves, dummies."""

from __future__ import annotations

import pytest
from engine_bundles import ALGORITHMS, HOSTS, Step, pair
from engine_peers import Peer, address, make_peer, policy, udp

from ipsecq.counters import Counter, Fate
from ipsecq.crypto import cipher
from ipsecq.engine.emit import PeerMoved
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet import checksum, ipv4
from ipsecq.sa.association import NatTraversal, SecurityAssociation, Slot
from ipsecq.transforms import natt
from ipsecq.transforms.esp import EspTransform

ESP, AH = Protocol.ESP, Protocol.AH
ESN = (("esn", True),)
KINDS = {
    "esp gcm": Step(ESP, "gcm", 4, ESN), "esp cbc": Step(ESP, "cbc", 4, ESN), "esp null": Step(ESP, "null", 0, ESN),
    "ah": Step(AH, "sha256", 4, ESN), "ah transport": Step(AH, "gmac", 0, ESN),
}  # fmt: skip
PACKET = udp(*HOSTS[4], b"payload")
WRAP = 1 << 32


def start(peer: Peer, last: int) -> None:
    """Both directions of all SAs have come to ``last``."""
    for sa in peer.tables.sad:
        peer.tables.words[sa.slot + Slot.LEASED] = last + 1
        peer.tables.words[sa.slot + Slot.SEQUENCE] = last


def edge(peer: Peer, spi: int = 0x1000) -> int:
    return next(int(peer.tables.words[sa.slot + Slot.SEQUENCE]) for sa in peer.tables.sad if sa.spi == spi)


@pytest.mark.parametrize("kind", KINDS)
def test_the_high_half_grows_at_both_ends_when_the_low_half_wraps(kind: str) -> None:
    left, right = pair([KINDS[kind]])
    start(left, WRAP - 3)
    start(right, WRAP - 3)
    sealed = [left.send(PACKET)[1][0] for _ in range(8)]
    late = sealed.pop(1)  # from before the wrap, arrives after it
    for datagram in sealed:
        assert right.receive(datagram) == (Fate.DONE, [PACKET])
    assert edge(right) == WRAP + 5
    assert right.receive(late) == (Fate.DONE, [PACKET])
    assert right.receive(late)[1] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_below_half_the_space_is_bridged(kind: str) -> None:
    left, right = pair([KINDS[kind]])
    start(left, WRAP + (1 << 31) - 2)
    start(right, WRAP + 10)
    assert right.receive(left.send(PACKET)[1][0]) == (Fate.DONE, [PACKET])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_of_a_whole_low_half_is_refused_and_moves_nothing(kind: str) -> None:
    """RFC 4303 appendix A: the receiver cannot know the high half then, and authentication fails."""
    left, right = pair([KINDS[kind]])
    start(right, 1000)
    start(left, WRAP + 2000)
    fate, inner = right.receive(left.send(PACKET)[1][0])
    assert inner == []
    assert fate in {Counter.ESP_BADAUTH, Counter.AH_BADAUTH}
    assert edge(right) == 1000


@pytest.mark.parametrize(
    ("step", "wrap"),
    [(Step(ESP, "gcm", 4), Counter.ESP_WRAP), (Step(ESP, "cbc"), Counter.ESP_WRAP), (Step(AH, "sha1"), Counter.AH_WRAP)],
)
def test_without_esn_the_last_number_ends_the_sa(step: Step, wrap: Counter) -> None:
    left, right = pair([step])
    start(left, WRAP - 3)
    start(right, WRAP - 3)
    for _ in range(2):
        assert right.receive(left.send(PACKET)[1][0]) == (Fate.DONE, [PACKET])
    for _ in range(3):
        assert left.send(PACKET) == (wrap, [])
    assert edge(left) == WRAP - 1


@pytest.mark.parametrize("size", [0, 32, 64, 1024, 65536])
def test_replay_windows_from_none_to_tens_of_thousands(size: int) -> None:
    left, right = pair([Step(ESP, "gcm", 4, (("replay_window", size),))])
    sealed = [left.send(PACKET)[1][0] for _ in range(40)]
    assert right.receive(sealed[39])[0] == Fate.DONE
    assert (right.receive(sealed[39])[0] == Fate.DONE) == (size == 0)
    oldest = right.receive(sealed[0])[0]
    assert oldest == (Counter.ESP_REPLAY if size == 32 else Fate.DONE)


# -- dummies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [0, 4])
def test_dummy_packets_are_absorbed_and_counted_and_move_the_window(outer: int) -> None:
    _, right = pair([Step(ESP, "gcm", outer)])
    sa = next(sa for sa in right.tables.sad if sa.spi == 0x1000)
    built = cipher.build("aes-gcm-16", sa.encryption_key, None, sa.authentication_key)
    body = EspTransform(0x1000, built).seal(bytes(1000), 59, 7)
    dummy = ipv4.header(sa.src, sa.dst, 50, len(body)) + body
    assert right.receive(dummy) == (Fate.ABSORBED, [])
    assert right.count(Counter.ESP_DUMMY) == 1
    assert right.receive(dummy) == (Counter.ESP_REPLAY, [])


# -- NAT traversal ----------------------------------------------------------------------------------------------------

A, B = "192.0.2.1", "192.0.2.2"


def behind_a_nat(*, rebind: bool) -> tuple[Peer, Peer]:
    key = ALGORITHMS["gcm"]
    nat = NatTraversal(4500, 4500, rebind=rebind)
    sa = SecurityAssociation(ESP, 0x1000, address(A), address(B), Mode.TUNNEL, replay_window=64, natt=nat, **key)
    text = f"ipsec esp/tunnel/{A}-{B}/require"
    return (
        make_peer([sa], [policy("out", "10.1.0.0/24", "10.2.0.0/24", text)]),
        make_peer([sa], [policy("in", "10.1.0.0/24", "10.2.0.0/24", text)]),
    )


def translated(datagram: bytes, src: str, port: int) -> bytes:
    changed = bytearray(datagram)
    changed[12:16] = address(src)
    changed[20:22] = port.to_bytes(2, "big")
    head = changed[:20]
    ipv4.fix_checksum(head)
    assert checksum.ones_complement(head) == 0xFFFF
    return bytes(head) + bytes(changed[20:])


def test_a_peer_that_moved_is_told_once_for_each_place_after_authentication() -> None:
    left, right = behind_a_nat(rebind=True)
    packets = [left.send(PACKET)[1][0] for _ in range(4)]
    forged = bytearray(translated(packets[0], "198.51.100.66", 666))
    forged[-1] ^= 1
    assert right.receive(bytes(forged)) == (Counter.ESP_BADAUTH, [])
    assert right.emit.events == []
    events = []
    for datagram, port in zip(packets, (4500, 61000, 61000, 61001), strict=True):
        src = A if port == 4500 else "198.51.100.7"
        assert right.receive(translated(datagram, src, port)) == (Fate.DONE, [PACKET])
        events += right.emit.events
    moved = [(event.src, event.sport) for event in events if isinstance(event, PeerMoved)]
    assert moved == [(address("198.51.100.7"), 61000), (address("198.51.100.7"), 61001)]


def test_a_replayed_packet_from_elsewhere_moves_nobody() -> None:
    left, right = behind_a_nat(rebind=True)
    datagram = left.send(PACKET)[1][0]
    assert right.receive(datagram)[0] == Fate.DONE
    assert right.receive(translated(datagram, "198.51.100.66", 666)) == (Counter.ESP_REPLAY, [])
    assert right.emit.events == []


def test_without_leave_to_rebind_a_moved_peer_is_heard_but_not_followed() -> None:
    left, right = behind_a_nat(rebind=False)
    datagram = left.send(PACKET)[1][0]
    assert right.receive(translated(datagram, "198.51.100.7", 61000)) == (Fate.DONE, [PACKET])
    assert right.emit.events == []
    assert right.count(Counter.NATT_REBOUND) == 0


def test_keepalives_are_absorbed_and_ike_behind_its_marker_passes() -> None:
    _, right = behind_a_nat(rebind=True)
    sa = next(iter(right.tables.sad))
    keepalive = natt.keepalive(NatTraversal())
    assert right.receive(ipv4.header(sa.src, sa.dst, 17, len(keepalive)) + keepalive) == (Fate.ABSORBED, [])
    assert right.count(Counter.NATT_KEEPALIVE) == 1
    assert right.receive(udp(A, B, bytes(4) + b"ike header" * 3, sport=4500, dport=4500)) == (Fate.PASS, [])
